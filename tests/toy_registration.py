"""Registration of a toy model, undisturbed or with a fault at a chosen write."""

import math
import os
import shutil
import sqlite3
import sys
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import sqlalchemy
from sqlalchemy import event
from tiny import LINEAGE, make_model

from gptpipe.base.manifest import Manifest, read_manifest
from gptpipe.evaluate.evaluate import Evaluation
from gptpipe.evaluate.registry import record_evaluation
from gptpipe.params import Params
from gptpipe.record.run import training_run

KILLED, STOPPED, ENDED = 99, 98, 0


def toy_documents(bits: float | None, digest: str = "d1") -> pd.DataFrame:
    """Ten test documents of 100 bytes; `bits` per byte on average, a few percent more or less in each."""
    percent = [] if bits is None else [-4, 4, -3, 3, -2, 2, -1, 1, 0, 0]
    return pd.DataFrame(
        {
            "split": ["test" for _ in percent],
            "id": [f"{digest}-{i}" for i, _ in enumerate(percent)],
            "source": ["toy" for _ in percent],
            "n_bytes": [100 for _ in percent],
            "nats": [(bits or 0) * math.log(2) * (100 + more) for more in percent],
        }
    )


def toy_evaluation(bits: float | None, digest: str = "d1", split: Manifest = LINEAGE) -> Evaluation:
    results: dict[str, Any] = {"val": {"loss": 1.0}, "continuations": {}, "reference_bits_per_byte": {}}
    results |= {"test_digest": digest} | ({} if bits is None else {"test": {"bits_per_byte": bits}})
    return Evaluation(
        results,
        samples="samples",
        step=7,
        n_parameters=1_900_000,
        split=split,
        documents=toy_documents(bits, digest),
    )


def evaluate(params: Params, model: Path, run_id: str | None, bits: float | None, digest: str = "d1") -> str:
    name = run_id or uuid.uuid4().hex  # of a run that the store does not know
    charts = {"Loss by position": "<svg/>"}
    evaluation = toy_evaluation(bits, digest)
    return record_evaluation(params, params.evaluate, evaluation, name, "# card", "<html/>", charts, model)


class Fault(KeyboardInterrupt):
    """Ctrl-C at a chosen write."""


def at_each_write(do: Callable[[str], None]) -> None:
    """Call `do` with a name before each change of a file and before each change or commit in the store."""

    def file_operation(name: str, arguments: tuple[Any, ...]) -> None:
        writes = name == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        is_of_interpreter = name == "open" and "__pycache__" in str(arguments[0])
        if not is_of_interpreter and (writes or name in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")):
            do(f"{name} {arguments[0]}")

    sys.addaudithook(file_operation)
    event.listen(sqlalchemy.Engine, "commit", lambda _: do("commit"))

    @event.listens_for(sqlalchemy.Engine, "before_cursor_execute")
    def _(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.split()[0] in ("INSERT", "UPDATE", "DELETE"):
            do(statement)


def in_a_child(action: Callable[[], None], fault: str = "", at: int = -1) -> tuple[int, int]:
    """Run `action` in a forked process, with a fault at write number `at`; returns its exit code and writes."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        code, writes = 1, 0
        try:

            def count(_: str) -> None:
                nonlocal writes
                writes += 1
                if writes - 1 == at and fault == "kill":
                    os._exit(KILLED)
                if writes - 1 == at:
                    raise Fault

            at_each_write(count)
            action()
            code = ENDED
        except Fault:
            code = STOPPED
        finally:
            os.write(sending, str(writes).encode())
            os._exit(code)
    os.close(sending)
    with os.fdopen(receiving) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(said or -1)


class Registration:
    """One evaluation in a project that can be put back to the state before it."""

    def __init__(self, project: Path, params: Params, *, is_known: bool) -> None:
        self.project, self.params = project, params
        self.model = make_model(project / "models/gpt")
        self.run_id = "f" * 32  # of a training that this store does not know
        if is_known:
            self.run_id = self.train()
        self.kept = project.with_name("kept")
        shutil.copytree(project, self.kept)

    def train(self) -> str:
        """Record a training in another process, so that this one holds no connection to the store."""

        def action() -> None:
            with training_run(self.params, None, LINEAGE, {}, 1_853_056) as record:
                record.metrics([(7, 2, {"val/loss": 1.0})])
            (self.project / "run_id").write_text(record.run_id)

        assert in_a_child(action)[0] == ENDED
        return (self.project / "run_id").read_text()

    def restart(self) -> None:
        for path in self.project.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self.kept, self.project, dirs_exist_ok=True)

    def act(self) -> None:
        line = evaluate(self.params, self.model, self.run_id, 2.0)
        assert "champion" in line, line

    def check(self) -> None:
        """What the promise I7 says, read from the store without MLflow."""
        with closing(sqlite3.connect(self.project / "mlflow.db")) as store:

            def rows(query: str) -> list[Any]:
                return store.execute(query).fetchall()

            assert rows("select status, lifecycle_stage from runs") == [("FINISHED", "active")]
            (run_id,) = rows("select run_uuid from runs")[0]
            digest = read_manifest(self.model).digest
            ((model_id, location),) = rows("select model_id, artifact_location from logged_models")
            assert rows("select status, lifecycle_stage, source_run_id from logged_models") == [
                (2, "active", run_id)
            ]
            assert rows("select tag_value from logged_model_tags where tag_key = 'model_digest'") == [(digest,)]
            assert rows("select version, run_id, source, description from model_versions") == [
                (1, run_id, f"models:/{model_id}", "# card")
            ]
            assert rows("select value from model_version_tags where key = 'model_digest'") == [(digest,)]
            assert rows("select alias, version from registered_model_aliases") == [("champion", 1)]
            assert rows("select destination_id from inputs where source_type = 'RUN_OUTPUT'") == [(model_id,)]
            metrics = rows("select key, step, value from metrics where key not like 'system/%' order by key")
            assert metrics == [("test/bits_per_byte", 7, 2.0), ("val/loss", 7, 1.0)]
        stored = Path(location.removeprefix("file://")) / "artifacts/gpt"
        assert read_manifest(stored).digest == digest
        assert [path.name for path in (self.project / "mlartifacts").rglob("m-*")] == [model_id]
        assert not list(self.project.rglob("*.partial"))

    def try_fault(self, fault: str, at: int) -> None:
        self.restart()
        code, _ = in_a_child(self.act, fault, at)
        assert code == {"kill": KILLED, "stop": STOPPED}[fault], f"{fault} at write {at} ended with {code}"
        assert in_a_child(self.act)[0] == ENDED, f"the rerun after a {fault} at write {at} failed"
        self.check()
