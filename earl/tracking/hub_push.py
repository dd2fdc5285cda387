"""The Hugging Face hub: one repository a run, one commit and one tag an iteration, each pushed once.

A commit's title names the policy's digest, so the hub itself says what it has: what a killed process had committed is
only tagged by the next one.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from earl import tracking
from earl.files import manifest, objects
from earl.files.layout import Iteration, Run, iteration_name
from earl.messages import network
from earl.messages.errors import EarlError
from earl.run import state
from earl.tracking import origin

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from earl.config.schema import Config

POLICY = ", policy "
"""What stands between number and digest in a commit's title."""

log = logging.getLogger(__name__)


def push(run: Run, config: "Config") -> tracking.Sent:
    """Push the policies that are due and that the hub does not have, in order; the newest becomes the main revision.

    Raises:
        EarlError: when there is no token, the hub is not reached or refuses, or it holds another policy under the name
            of one of this run's iterations.
    """
    if not config.push_to_hub:
        return tracking.Sent([], "the hub (push_to_hub is false)")
    tracking.check_hub(config)
    from huggingface_hub import HfApi

    remedy = "check the network, the token (`hf auth whoami`) and push_to_hub_repo_id"
    with tracking.lock(run, "hub"), network.failures(f"hub, repository {config.push_to_hub_repo_id}", remedy):
        state = tracking.folder(run) / "hub.json"
        pushed = _pushed(run, config, state)
        new = []
        repository = None
        for index in due(run, config):
            iteration = run.iteration(index)
            if not iteration.policy.is_dir():
                if str(index) not in pushed:
                    log.warning(
                        "%s: is not on disk, so it is not pushed; bring it back by `earl restore --run %s --iteration "
                        "%d`, then push again", *(iteration.policy, run.path, index),
                    )  # fmt: skip
                continue
            digest = manifest.digest_folder(iteration.policy)
            if pushed.get(str(index), {}).get("policy_digest") == digest:
                continue
            repository = repository or _Repository(HfApi(), config)
            commit = repository.push(run, iteration, digest)
            pushed[str(index)] = {"policy_digest": digest, "commit": commit, "repository": repository.id}
            objects.write(state, {"folder": origin.here(run), "pushed": pushed})
            new.append(index)
        return tracking.Sent(new, f"{config.push_to_hub_repo_id} on the hub")


def _pushed(run: Run, config: "Config", state: Path) -> dict[str, dict[str, str]]:
    """Return what was pushed of a run, by iteration: policy, commit, repository. Nothing was of a copy.

    Raises:
        EarlError: the run is a copy of one that was pushed to the same repository.
    """
    known = tracking.read_state(state)
    pushed: dict[str, dict[str, str]] = known.get("pushed", {})
    if not origin.is_copy(run, known.get("folder"), state):
        return pushed
    wanted = str(config.push_to_hub_repo_id)
    for entry in pushed.values():
        if wanted in (entry["repository"], entry["repository"].rpartition("/")[2]):
            raise EarlError(
                f"{run.path}: is a copy of {known['folder']['path']}, whose policies are in repository "
                f"{entry['repository']} on the hub; set push_to_hub_repo_id to another name, or remove {state} where "
                "the copy takes the place of the original"
            )
    return {}


def due(run: Run, config: "Config") -> list[int]:
    """Return the iterations whose policies belong on the hub: every n-th one, and the last of the run.

    Before the first adapter comes its base, the starting policy; an export of an adapter holds it.
    """
    every = config.push_to_hub_every_n_iterations
    newest = state.newest_complete(run)
    wanted = set(range(every, newest + 1, every)) if every else set()
    wanted |= {newest} if newest and newest >= config.num_iterations else set()
    wanted |= {0} if wanted and config.lora is not None and not config.push_to_hub_exports else set()
    return sorted(wanted)


@contextmanager
def _checked(iteration: Iteration) -> Iterator[Path]:
    """Yield the folder of a policy, of which no file is damaged."""
    if iteration.index or (iteration.policy / manifest.NAME).is_file():
        manifest.check(iteration.policy, deep=True)
    yield iteration.policy


@contextmanager
def _exported(run: Run, iteration: Iteration) -> Iterator[Path]:
    """Yield the folder of an export, which goes afterwards; what a killed process has left is replaced."""
    from earl.stages import export

    out = tracking.folder(run) / "export"
    export.of_run(run.path, iteration.index, out)
    try:
        yield out
    finally:
        shutil.rmtree(out)


class _Repository:
    """A repository on the hub; made where there is none yet."""

    def __init__(self, api: "HfApi", config: "Config") -> None:
        self.api, self.exports = api, config.push_to_hub_exports
        made = api.create_repo(config.push_to_hub_repo_id, private=config.push_to_hub_private, exist_ok=True)
        self.id = made.repo_id
        self.tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(self.id).tags}
        # Newest first, so that of several commits of one policy the newest stands last.
        history = [(commit.title.rpartition(POLICY)[2], commit.commit_id) for commit in api.list_repo_commits(self.id)]
        self.commits = dict(reversed(history))
        self.policies = {commit: policy for policy, commit in history}

    def push(self, run: Run, iteration: Iteration, digest: str) -> str:
        """Commit and tag a policy where that is not done yet; return the commit."""
        tag, policy = f"iteration-{iteration_name(iteration.index)}", digest[:16]
        if tag in self.tags:
            if self.policies.get(self.tags[tag]) != policy:
                raise EarlError(
                    f"hub, repository {self.id}: tag {tag} is another policy than {iteration.policy}; the run was "
                    "trained again since: set push_to_hub_repo_id to another name, or delete the tag"
                )
            return self.tags[tag]
        commit = self.commits.get(policy)
        if commit is None:
            with _exported(run, iteration) if self.exports else _checked(iteration) as folder:
                commit = self._commit(folder, f"Iteration {iteration.index}{POLICY}{policy}")
        self.api.create_tag(self.id, tag=tag, revision=commit)
        log.info("pushed %s as %s of %s", iteration.policy, tag, self.id)
        return commit

    def _commit(self, folder: Path, title: str) -> str:
        """Commit the files of a folder; what another policy had beside them goes."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        head = self.api.repo_info(self.id).sha
        members = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        foreign = set(self.api.list_repo_files(self.id)) - members.keys() - {".gitattributes", "README.md"}
        operations = [CommitOperationAdd(name, path) for name, path in members.items()]
        operations += [CommitOperationDelete(name) for name in sorted(foreign)]
        # Refused where someone else has committed in between.
        return self.api.create_commit(self.id, operations, commit_message=title, parent_commit=head).oid
