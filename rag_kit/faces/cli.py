"""`rag-kit`: every capability as a command. Parses, calls, prints; errors become two sentences.

Each command starts with `settings.start`, so that network, language and logging hold before any library
is imported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rag_kit.errors import RagKitError, message
from rag_kit.faces import adapter_commands, commands, export_commands, ops_commands, run_commands

Handler = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 (a check failed), 2 (a mistake), 130 (Ctrl-C)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console may not speak Chinese by default
            stream.reconfigure(encoding="utf-8", errors="replace")
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.handler is None:
        parser.print_help()
        return 0
    handler: Handler = arguments.handler
    try:
        return handler(arguments)
    except RagKitError as error:
        print(f"{message('cli_error')} {error.message}\n{error.hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{message('cli_interrupted')}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `rag-kit … | head`
        sys.stderr.close()
        return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command; imports nothing heavy."""
    parser = argparse.ArgumentParser(prog="rag-kit", description="Is my LoRA worth it?")
    parser.set_defaults(handler=None)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, handler: Handler, text: str, parent: object = None) -> argparse.ArgumentParser:
        group = subparsers if parent is None else parent
        made = group.add_parser(name, help=text, description=text)  # type: ignore[attr-defined]
        made.set_defaults(handler=handler)
        return made  # type: ignore[no-any-return]

    command("setup", commands.setup, "prepare the embedded models (once)")
    run = command("run", run_commands.run, "the main job: execute notebooks 01-03 and print the table")
    run.add_argument("notebooks", nargs="*", help="numbers, names or paths, or all (default: 01 02 03)")
    run.add_argument("-p", dest="parameters", action="append", default=[], metavar="KEY=VALUE")
    run.add_argument("--params", metavar="FILE", help="parameters, of the form in notebooks/params")
    run.add_argument("--sweep", metavar="FILE", help="go through every combination of the file's sweep")
    run.add_argument("--jobs", type=int, default=1, help="so many runs of one notebook side by side")
    run.add_argument("--limit-s", type=float, default=3600, help="kill a notebook after so many seconds")
    run.add_argument("--run", dest="run_name", help="folder below runs/; named again, it resumes")
    runs = subparsers.add_parser("runs", help="list, show and diff what lies below runs/")
    runs.set_defaults(handler=None)
    actions = runs.add_subparsers(metavar="ACTION", required=True)
    command("list", run_commands.runs_list, "notebook runs and comparisons", actions)
    show = command("show", run_commands.runs_show, "parameters, metrics and failures of a run", actions)
    show.add_argument("run", help="ID, or ID/FOLDER for one of its notebooks")
    diff = command("diff", run_commands.runs_diff, "two runs' parameters and metrics side by side", actions)
    diff.add_argument("a")
    diff.add_argument("b")
    test = command("test", commands.test, "the tests, then the notebooks against their committed outputs")
    test.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to pytest")
    refresh = command(
        "refresh-notebooks", commands.refresh_notebooks, "execute notebooks and keep their outputs"
    )
    refresh.add_argument("notebooks", nargs="*", help="numbers or names (default: all)")
    command("config", commands.config, "every setting, its value and where it came from")
    health = command("health", ops_commands.health, "what is in order, what is not, and what to do about it")
    health.add_argument("--json", action="store_true", help="the guide's /health, with every check")
    bench = command("bench", ops_commands.bench, "how fast it is here, side by side; the last line is JSON")
    bench.add_argument("name", help="engines")
    bench.add_argument("--quick", action="store_true", help="fewer repeats and smaller inputs")
    bench.add_argument("--repeats", type=int, help="warm repeats (default: 7, with --quick 3)")
    bench.add_argument("--order", choices=("ours-first", "other-first"), default="ours-first")

    index = subparsers.add_parser("index", help="build, list, verify and search indexes")
    index.set_defaults(handler=None)
    actions = index.add_subparsers(metavar="ACTION", required=True)
    build = command("build", commands.index_build, "build an index from a file or folder", actions)
    build.add_argument("documents", type=Path, nargs="?", help="default: the sample handbook")
    build.add_argument("--name", help="folder below VECTOR_STORE_PATH (default: the documents' name)")
    command("list", commands.index_list, "the indexes at hand", actions)
    verify = command("verify", commands.index_verify, "check an index's files against their hashes", actions)
    verify.add_argument("--name")
    search = command("search", commands.index_search, "the best chunks for a question", actions)
    search.add_argument("question")
    search.add_argument("--name")
    search.add_argument("--top_k", "--top-k", type=int, default=4)

    adapters = subparsers.add_parser("adapters", help="list, check, take in and remove adapters")
    adapters.set_defaults(handler=None)
    actions = adapters.add_subparsers(metavar="ACTION", required=True)
    command("list", adapter_commands.adapters_list, "the adapters in LORA_MODEL_PATH", actions)
    check = command(
        "check", adapter_commands.adapters_check, "whether they are whole and do something", actions
    )
    check.add_argument("names", nargs="*", help="NAME or NAME/checkpoint-N (default: all)")
    add = command("add", adapter_commands.adapters_add, "take in an adapter made elsewhere", actions)
    add.add_argument("folder", type=Path)
    add.add_argument("--base", help="the base it was trained on (default: BASE_MODEL_NAME)")
    add.add_argument("--name", help="its name here (default: the folder's)")
    remove = command("remove", adapter_commands.adapters_remove, "delete an adapter's files", actions)
    remove.add_argument("name", help="exactly as `list` shows it")

    export = command("export", export_commands.adapters_export, "make it a model of Ollama's", actions)
    export.add_argument("name", help="an adapter's name")
    export.add_argument("--to", metavar="MODEL", help="its name there (default: the adapter's)")
    export.add_argument("--how", choices=("auto", "adapter", "merged"), default="auto")
    export.add_argument("--kind", default="Q8_0", help="block type of merged weights")
    export.add_argument("--replace", action="store_true", help="where a model of that name is there")
    export.add_argument("--force", action="store_true", help="also one that the doctor refuses")
    serve = command("serve-ollama", export_commands.serve_ollama, "base and adapters for any Ollama client")
    serve.add_argument("adapters", nargs="*", help="names (default: all that pass `adapters check`)")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=11435)
    serve.add_argument("--force", action="store_true", help="also those that the doctor refuses")
    drift = command("drift", export_commands.drift, "which step from PEFT to a served file costs quality")
    drift.add_argument("name", help="an adapter's name")
    drift.add_argument("--questions", type=Path, help=".jsonl, .json (SQuAD), .csv, .xlsx (default: sample)")
    drift.add_argument("--split", default="paraphrase", help="train, test, paraphrase or all")
    drift.add_argument("--limit", type=int, default=6, help="so many questions, drawn with seed 0")
    drift.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=24)
    drift.add_argument("--ollama", metavar="MODEL", help="a model on Ollama as the last step")
    drift.add_argument("--json", action="store_true")

    finetune = command("finetune", commands.finetune, "train a LoRA adapter")
    from rag_kit.finetune.arguments import add_arguments

    add_arguments(finetune)

    ask = command("ask", commands.ask, "answer a question from the index, with sources")
    ask.add_argument("question")
    ask.add_argument("--model", help="a model reference: base, lora, lora:NAME, ollama:MODEL, …")
    ask.add_argument("--use_lora", "--use-lora", choices=("true", "false"), help="false means OLLAMA_MODEL")
    ask.add_argument("--force", action="store_true", help="also with an adapter that the doctor refuses")
    ask.add_argument("--top_k", "--top-k", type=int, default=4, help="passages; 0 asks without sources")

    compare = command("compare", commands.compare, "put arms side by side over a question set")
    compare.add_argument(
        "--arms",
        nargs="+",
        default=["base+none", "base+retrieved", "lora+none", "lora+retrieved"],
        help="MODEL+CONTEXT, such as lora:NAME+retrieved or ollama:qwen3:4b+none",
    )
    compare.add_argument(
        "--questions", type=Path, help=".jsonl, .json (SQuAD), .csv, .xlsx (default: sample)"
    )
    compare.add_argument("--documents", type=Path, help="what to index (default: the questions' own)")
    compare.add_argument("--split", default="test", help="train, test, paraphrase or all")
    compare.add_argument("--language", choices=("en", "zh"))
    compare.add_argument("--limit", type=int, help="so many questions, drawn with seed 0")
    compare.add_argument("--top_k", "--top-k", type=int, default=4)
    compare.add_argument("--max_new_tokens", "--max-new-tokens", type=int)
    compare.add_argument(
        "--generation-config", action="store_true", help="apply what the base's maker suggests to local arms"
    )
    compare.add_argument("--force", action="store_true", help="let adapters answer that the doctor refuses")
    compare.add_argument("--run", dest="run_name", help="folder below runs/; named again, it resumes")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
