"""`python -m rag_kit COMMAND`: the command line, from any Python; makes the project's own one first."""

import sys

from rag_kit.bootstrap import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
