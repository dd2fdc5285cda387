"""Weights & Biases: one page a run, one step an iteration, each sent once.

`online` asks the server which step it has last and goes on after it, so a process that was killed at any moment
doubles nothing. `offline` writes each step into one folder, a folder a call, which `wandb sync` appends to the page in
the order of time. It does not look at steps: one that is interrupted, or told to send folders again, appends lines
that the page has. `earl track --online` sends an offline run without that risk.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earl import tracking
from earl.config.freeze import config_digest
from earl.files import images, objects
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.tracking import files, origin

if TYPE_CHECKING:
    import wandb

    from earl.config.schema import Config

TABLE = "episodes"
FINISH_SECONDS = 600
"""How long a call waits for the server to take everything."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Page:
    """What we know of a run's page, kept in ``<run>/tracking/wandb.json``.

    Attributes:
        id: the page's, unique in its project.
        name: what it is called there.
        generation: counts pages of one run folder, from 1.
        policies: what may have been sent, written before it is: policy digests by iteration.
        complete: the last iteration known to be there with everything; -1 for none.
        offline: names of the offline folders that are whole, each with the last iteration in it.
        folder: where the run folder was, see `earl.tracking.origin`.
    """

    id: str
    name: str
    generation: int = 1
    policies: dict[str, str] = field(default_factory=dict)
    complete: int = -1
    offline: dict[str, int] = field(default_factory=dict)
    folder: dict[str, Any] | None = None

    def contradicts(self, rows: Iterable[files.Row]) -> bool:
        """Return whether an iteration has been trained again, into another policy than the one that was sent."""
        return any(self.policies.get(str(row.iteration), row.policy_digest) != row.policy_digest for row in rows)


def send(run: Run, config: "Config") -> tracking.Sent:
    """Send what the page does not have, and before it the fine-tunings that the run starts from, each once.

    Raises:
        EarlError: when wandb is not installed, the server is not reached or refuses, or a file of the run is damaged.
    """
    tracking.check_wandb(config)
    if config.wandb_mode == "disabled":
        return tracking.Sent([], "Weights & Biases (wandb_mode is `disabled`)")
    with tracking.lock(run, "wandb"):
        for tuning in files.fine_tunings(config):
            _send_fine_tuning(run, config, tuning)
        rows = files.rows(run, config)
        page = _page(run, config, rows)
        return (_send_offline if config.wandb_mode == "offline" else _send_online)(run, config, page, rows)


def _page(run: Run, config: "Config", rows: list[files.Row]) -> Page:
    """Return the run's page: the one it has, a first one, or a new one for a copy or after `earl rewind`."""
    known = tracking.read_state(_state(run))
    page = Page(**known) if known else Page(_id(run, config), config.run_name)
    if origin.is_copy(run, page.folder, _state(run)):
        page = _page_of_copy(run, config, page)
    page = replace(page, folder=origin.here(run))
    if page.contradicts(rows):
        # Steps of a page cannot be changed; two histories on one page would be neither.
        base, generation = page.id.removesuffix(f"-{page.generation}"), page.generation + 1
        page = Page(f"{base}-{generation}", f"{config.run_name} ({generation})", generation, folder=page.folder)
        log.info("the run was trained again since it was sent: it gets a new page, %s", page.name)
    return page


def _page_of_copy(run: Run, config: "Config", original: Page) -> Page:
    """Return a page for a copied run folder; offline folders that came with it stand aside, lest they be synced."""
    page = Page(_id(run, config), f"{config.run_name} (copy)")
    log.info(
        "%s is a copy of %s, which has the W&B run %s: the copy gets its own, %s (to keep the old one, set "
        "WANDB_RUN_ID=%s)",
        *(run.path, original.folder and original.folder["path"], original.id, page.id, original.id),
    )
    left = tracking.folder(run) / "wandb"
    if left.is_dir():
        left.rename(left.with_name(f"wandb-of-{original.id}"))
    objects.write(_state(run), asdict(replace(page, folder=origin.here(run))))
    return page


def _state(run: Run) -> Path:
    return tracking.folder(run) / "wandb.json"


def _id(run: Run, config: "Config") -> str:
    """Return the id of a run's first page: WANDB_RUN_ID, or the run's name with a digest of folder and configuration.

    Chosen once and kept in the run folder, which may move afterwards; a copy of the folder chooses again.
    """
    unique = f"{run.path.resolve()}\n{config_digest(config)}".encode(errors="surrogateescape")
    return os.environ.get("WANDB_RUN_ID") or f"{config.run_name}-{hashlib.sha256(unique).hexdigest()[:8]}"


def _send_fine_tuning(run: Run, config: "Config", tuning: files.FineTuning) -> None:
    """Send the curve of a fine-tuning as a page of its own, a step a step, unless that was done."""
    state = tracking.folder(run) / "wandb-sft.json"
    sent: dict[str, int] = tracking.read_state(state)
    key = f"{config.wandb_mode}/{tuning.name}"
    if key in sent:
        return
    for left in (tracking.folder(run) / "wandb").glob(f"offline-run-*-{tuning.name}"):
        shutil.rmtree(left)  # of a process that was killed
    with _session(run, config, Page(tuning.name, tuning.name)) as session:
        for step, figures in enumerate(tuning.curve, start=1):
            if step >= session.starting_step:  # Another run that starts from it may have sent it.
                session.log(figures, step=step)
    objects.write(state, sent | {key: len(tuning.curve)})
    log.info("sent the fine-tuning %s", tuning.name)


def _send_online(run: Run, config: "Config", page: Page, rows: list[files.Row]) -> tracking.Sent:
    where = f"{config.wandb_project}/{page.id} on Weights & Biases"
    if not rows or rows[-1].iteration <= page.complete:
        return tracking.Sent([], where)
    # Before anything is sent: whatever arrives before this process is killed will be known for ours.
    page = replace(page, policies=page.policies | _policies(rows))
    objects.write(_state(run), asdict(page))
    with _session(run, config, page) as session:
        new = [row for row in rows if row.iteration >= session.starting_step]
        # Steps arrive before the files they name; those of a process that was killed in between are sent once more.
        doubtful = [row for row in rows if page.complete < row.iteration < session.starting_step]
        _log_rows(run, config, session, new, [row.iteration for row in doubtful if files.has_table(config, row)])
        where = session.url or where
    objects.write(_state(run), asdict(replace(page, complete=rows[-1].iteration)))
    return tracking.Sent([row.iteration for row in new], where)


def _send_offline(run: Run, config: "Config", page: Page, rows: list[files.Row]) -> tracking.Sent:
    place = tracking.folder(run) / "wandb"
    new = [row for row in rows if row.iteration > max(page.offline.values(), default=-1)]
    if not new:
        return tracking.Sent([], place.as_posix())
    for left in place.glob(f"offline-run-*-{page.id}"):
        if left.name not in page.offline:
            shutil.rmtree(left)
    with _session(run, config, page) as session:
        _log_rows(run, config, session, new)
        written = Path(session.dir).parent.name
    page = replace(page, offline=page.offline | {written: new[-1].iteration}, policies=page.policies | _policies(rows))
    objects.write(_state(run), asdict(page))
    return tracking.Sent([row.iteration for row in new], f"{place / written}; to show it: wandb sync {place}")


def _policies(rows: list[files.Row]) -> dict[str, str]:
    return {str(row.iteration): row.policy_digest for row in rows}


@contextmanager
def _session(run: Run, config: "Config", page: Page) -> Iterator["wandb.Run"]:
    """Yield a session of the page; everything logged has arrived (online) or is on disk (offline) at its end."""
    place = tracking.folder(run).resolve()
    # Tables are staged there; an offline run refers to them until it is synced.
    for name in ("DATA", "CACHE"):
        os.environ.setdefault(f"WANDB_{name}_DIR", str(place / "wandb" / name.lower()))
    (place / "wandb").mkdir(parents=True, exist_ok=True)
    import wandb

    settings = wandb.Settings(
        # Nothing but the run's files is of interest: not this process, its machine, its output or its repository.
        x_disable_stats=True, x_disable_meta=True, x_disable_machine_info=True, disable_git=True, disable_code=True,
        console="off", silent=True, symlink=False, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True,
    )  # fmt: skip
    try:
        session = wandb.init(
            project=config.wandb_project, entity=config.wandb_entity, id=page.id, name=page.name, resume="allow",
            config=config.model_dump(mode="json"), dir=place, mode=config.wandb_mode, settings=settings,
        )  # fmt: skip
        try:
            yield session
        except BaseException:
            session.finish(exit_code=1)
            raise
        session.finish()
    except (wandb.Error, OSError) as error:
        raise EarlError(
            f"Weights & Biases, page {page.id} of project {config.wandb_project}: {' '.join(str(error).split())}; "
            "check the network, WANDB_API_KEY (or `wandb login`) and wandb_entity, or set wandb_mode to `offline`"
        ) from error


def _log_rows(
    run: Run, config: "Config", session: "wandb.Run", rows: list[files.Row], owed: Sequence[int] = ()
) -> None:
    """Log a step a row. Episodes of iterations that are ``owed`` come with the next table, else in the summary."""
    for row in rows:
        values: dict[str, Any] = dict(row.figures)
        if files.has_table(config, row):
            values[TABLE] = _table(run, [*owed, row.iteration])
            owed = ()
        session.log(values, step=row.iteration)
    if owed:
        session.summary[TABLE] = _table(run, owed)


def _table(run: Run, indices: Sequence[int]) -> "wandb.Table":
    """Return the episodes of these iterations as a table with pictures; a group's original is stored once."""
    import wandb
    from PIL import Image

    pictures: dict[bytes, wandb.Image] = {}

    def picture(data: bytes | None, where: str) -> "wandb.Image | None":
        if data is None:
            return None
        if data not in pictures:
            pictures[data] = wandb.Image(Image.fromarray(images.decode(data, where)))
        return pictures[data]

    table = wandb.Table(columns=list(files.COLUMNS))
    for index in indices:
        for episode in files.episodes(run, index):
            where = f"{run.iteration(index).path}, episode {episode['episode_id']}"
            shown = episode | {name: picture(episode[name], where) for name in files.PICTURES}
            table.add_data(*shown.values())
    return table
