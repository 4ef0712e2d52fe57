"""What the terminal shows of a run."""

import io

from rich.console import Console

from sk_triton.bench import table


def printed(run, width=140) -> str:
    stream = io.StringIO()
    table.show(run, Console(file=stream, width=width))
    return stream.getvalue()
