"""``python -m tools.emoji NAME [KEY=VALUE ...]``: makes a part of the embedded default."""

import sys

from compress.errors import UserError
from compress.models.quiet import hide_notices
from compress.system.allocator import keep_freed_memory
from tools.emoji import PARTS, run


def main() -> int:
    """Runs the command line; returns the exit code: 0, or 2 for a user's mistake."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"python -m tools.emoji NAME [KEY=VALUE ...]\n\nNAME is one of {', '.join(PARTS)}; see README.md.")
        return 0
    keep_freed_memory()
    hide_notices()  # before a part loads the libraries that say them
    try:
        run(arguments[0], arguments[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
