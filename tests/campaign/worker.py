"""A process that imports everything once. It reads one trial per line as JSON, and answers with the result.

    python -m campaign.worker FOLDER LAST_STAGE

It has one thread and forks for each run of a stage. Orphans of its children become its own children, so that it
can find and kill them.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that nothing that is printed is read as an answer
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)

    from campaign.trials import READS, Laboratory, files_read

    lab = Laboratory(Path(sys.argv[1]), sys.argv[2])
    states = lab.project.states
    reads = {stage: files_read(states / stage, stage) for stage in READS if stage in lab.stages}
    hello = {"operations": lab.operations, "seconds": lab.seconds, "reads": reads}
    print(json.dumps(hello), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(lab.try_out(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
