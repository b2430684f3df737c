"""The command line, run in this process, and what it says and leaves on the disk."""

import os
from pathlib import Path

from lorafx._cli.main import main

MERGE = ["merge", "base", "a.safetensors", "-o", "out"]


def error(capsys) -> str:
    """The one line on stderr."""
    lines = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("merging")
    ]
    assert len(lines) == 1 and lines[0].startswith("lorafx"), lines
    return lines[0]


def refused(capsys, *arguments: str) -> str:
    """What a merge says that changes nothing on the disk."""
    before = contents()
    assert main(list(arguments)) == 2
    assert contents() == before
    return error(capsys)


def contents() -> dict[str, object]:
    """All files, folders and links here."""
    return {
        str(path): (
            os.readlink(path)
            if path.is_symlink()
            else path.read_bytes() if path.is_file() else None
        )
        for path in Path().rglob("*")
    }


def interrupted(monkeypatch, after: int, arguments: list[str]) -> int:
    """Run until some files are whole, then stop as the disk fails; how many files were written."""
    real, written = os.replace, []

    def replace(source, target):
        if len(written) == after:
            raise OSError(5, "the disk is gone")
        written.append(target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        main(arguments)
    return len(written)


# A program that is interrupted while it runs `show`.
INTERRUPTED = """if True:
    import os, signal, time
    from lorafx._cli import commands, main as program
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    def show(options):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(9)
    commands.COMMANDS["show"] = show
    raise SystemExit(program.main())"""
