"""The commands `health` and `bench`: what they print, and with which status they end."""

from __future__ import annotations

import json
from argparse import Namespace
from contextlib import suppress

from rag_kit.errors import SettingsError
from rag_kit.settings import Settings, start


def health(arguments: Namespace) -> int:
    """Print what was found and what to do about it; 1 where something is there and cannot be used."""
    from rag_kit.ops.health import health as look

    settings: Settings | None = None
    with suppress(SettingsError):  # it will be among the findings
        settings = start()
    found = look(settings)
    print(json.dumps(found.as_dict(), ensure_ascii=False, indent=2) if arguments.json else found)
    return 0 if found.ok else 1


def bench(arguments: Namespace) -> int:
    """Print what is measured, the table, and as the last line one JSON object."""
    from rag_kit.faces.commands import _prepare
    from rag_kit.ops.bench import bench as measure

    settings = start()
    _prepare(settings)  # so that no side does it while it is timed
    how = {"quick": arguments.quick, "repeats": arguments.repeats, "order": arguments.order}
    result = measure(arguments.name, settings=settings, say=print, **how)
    print(result)
    print(result.json())
    return 0
