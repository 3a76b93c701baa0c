"""The console script `finetune`: a signal may come while the commands are being imported, which takes a second."""

import signal
import sys

from finetune.stopping import EXIT_CODES, Interrupted, stop


def main() -> int:
    """Run `finetune.cli.main`; `finetune train` can be stopped from here on as later, while it prepares."""
    try:
        if sys.argv[1:2] == ["train"]:
            stop.install()
        from finetune.cli.main import main as run

        return run()
    except Interrupted:
        line, code = stop.line(), stop.exit_code
    except KeyboardInterrupt:
        line, code = "interrupted", EXIT_CODES[signal.SIGINT]
    # After the handlers, where the interrupted frames are gone and their progress bars have ended their lines.
    print(line, file=sys.stderr)
    return code
