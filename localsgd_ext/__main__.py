"""``localsgd`` and ``python -m localsgd_ext``. ``localsgd doctor`` works without the extra ``[train]``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

# By every command but doctor. The method prunetrain needs torch_pruning besides, and says so; without tensorboard its curves are
# left out.
_NEEDED = ("typer", "rich", "torchvision", "matplotlib", "sklearn", "fontTools")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["doctor"]:
        from localsgd_ext import doctor

        return doctor.main(arguments[1:])
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"localsgd needs {', '.join(missing)}: pip install 'localsgd_ext[train]'", file=sys.stderr)
        return 2
    from localsgd_ext.train.cli import app

    try:
        app(args=arguments, prog_name="localsgd")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
