"""Learners that are split and stay in memory: in workers, with real processes, on the CPU."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from earl.config import freeze
from earl.execution import processes
from earl.launchers import local
from earl.run.layout import Run
from earl.workers import channel, client, local_team, pool
from tests.cluster.test_slurm_workers import workplace as slurm_workplace
from tests.integration.test_ranks import earl
from tests.integration.test_workers import place, wait_until  # noqa: F401  (place is a fixture)
from tests.support.train_files import made_of, make_config, write_inputs


def command(run, iteration: int) -> list[object]:
    return ["train", "--config", run.config, "--iteration", iteration, "--run", run.path]


def take_inputs(run, other) -> None:
    """Give a run the rollouts and scores of all iterations of another one, which it is going to repeat."""
    for source in sorted(other.path.glob("iterations/*/rollouts")):
        for name in ("rollouts", "scores"):
            shutil.copytree(source.parent / name, run.path / source.parent.relative_to(other.path) / name)


def about_trainer(said: str) -> list[str]:
    """What the learner says of where its state comes from."""
    return [line.split(" from ")[0] for line in said.splitlines() if line.startswith("trainer: ")]


FRESH = "trainer: iteration 1 starts with a fresh optimizer"


def kept(iteration: int) -> str:
    return f"trainer: iteration {iteration} ({iteration} optimizer steps) is in memory"


def loaded(iteration: int) -> str:
    return f"trainer: loaded iteration {iteration} ({iteration} optimizer steps)"


def processes_of(pool_path: str) -> dict[int, str]:
    """Processes that were started with a pool in their environment, but this one, and their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and f"={pool_path}\0".encode() in (entry / "environ").read_bytes() + b"\0":
                words = (entry / "cmdline").read_bytes().decode().split("\0")
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                    found[int(entry.name)] = " ".join(words)
    return found


def rank(pool_path: str, number: int, kind: str = "ranks") -> int:
    """Process id of a rank of the first worker of a kind."""
    (found,) = (
        pid
        for pid, words in processes_of(pool_path).items()
        if f"earl worker --pool {pool_path} --name {kind}" in words
        and f"\0RANK={number}\0" in Path(f"/proc/{pid}/environ").read_text()
    )
    return found


@pytest.fixture(scope="module")
def cold(tmp_path_factory, policy_folder, vocabulary):
    """Three iterations that two cold ranks trained."""
    run = Run(tmp_path_factory.mktemp("cold") / "run")
    run.iteration(0).path.mkdir(parents=True)
    run.iteration(0).policy.symlink_to(policy_folder)
    freeze.write(make_config(run.path, train_processes=2), run.config)
    for iteration in (1, 2, 3):
        write_inputs(run, iteration, vocabulary)
        done = earl(*command(run, iteration))
        assert done.returncode == 0, done.stderr
        assert about_trainer(done.stderr) == [FRESH if iteration == 1 else loaded(iteration - 1)]
    return run


@pytest.mark.slow
def test_ranks_that_stay_write_what_cold_ranks_write(place, cold, new_run):  # noqa: F811
    _, run = new_run(train_processes=2)
    take_inputs(run, cold)
    said = [about_trainer(place.good(*command(run, iteration))) for iteration in (1, 2, 3)]
    assert said == [[FRESH], [kept(1)], [kept(2)]]
    assert [made_of(run, i) for i in (1, 2, 3)] == [made_of(cold, i) for i in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_rank_that_is_killed_between_commands_is_replaced(place, cold, new_run, number):  # noqa: F811
    _, run = new_run(train_processes=2)
    take_inputs(run, cold)
    place.good(*command(run, 1))
    before = [rank(place.pool.path, each) for each in (0, 1)]
    os.kill(before[number], signal.SIGKILL)
    wait_until(lambda: not any(processes.is_alive(pid) for pid in before))
    assert about_trainer(place.good(*command(run, 2))) == [loaded(1)]
    assert about_trainer(place.good(*command(run, 3))) == [kept(2)]
    assert [made_of(run, i) for i in (1, 2, 3)] == [made_of(cold, i) for i in (1, 2, 3)]
    place.close()
    wait_until(lambda: not processes_of(place.pool.path))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "told"), [(0, "rank 0 of 2 was ended by SIGKILL"), (1, "rank 1 of 2 is gone")])
def test_rank_that_is_killed_in_a_command_fails_it_and_ends_all(place, cold, new_run, number, told):  # noqa: F811
    _, run = new_run(train_processes=2)
    take_inputs(run, cold)
    place.good(*command(run, 1))
    team = [rank(place.pool.path, each) for each in (0, 1)]
    os.kill(team[1], signal.SIGSTOP)  # Rank 0 waits for it in its first sum.
    idle = ticks(team[0])
    client = place.start(*command(run, 2))
    wait_until(lambda: is_connected(place.pool.file("ranks-0.sock")))
    wait_until(lambda: ticks(team[0]) > idle)  # Rank 0 has begun: before, a new team would do the command.
    os.kill(team[number], signal.SIGKILL)
    _, said = client.communicate(timeout=60)
    assert client.returncode == 1, said
    assert said.count("error: ") == 1
    assert told in said
    wait_until(lambda: not any(processes.is_alive(pid) for pid in team))
    assert about_trainer(place.good(*command(run, 2))) == [loaded(1)]
    assert [made_of(run, i) for i in (1, 2)] == [made_of(cold, i) for i in (1, 2)]


def ticks(pid: int) -> int:
    """Return the CPU time of a process, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[11]) + int(fields[12])


def is_connected(path: str) -> bool:
    """Whether a client is connected to a socket that a worker listens at."""
    listed = [line.split() for line in Path("/proc/net/unix").read_text().splitlines() if line.endswith(path)]
    return len(listed) > 1


@pytest.mark.slow
def test_another_number_of_ranks_and_another_learning_rate_go_on_from_disk(place, cold, new_run):  # noqa: F811
    """2 ranks -> 1 -> 2 -> 2 with another rate -> the same iteration again -> the one before."""
    _, run = new_run(train_processes=2)
    take_inputs(run, cold)
    others = {}
    for name, changes in (("alone", {}), ("rate", {"train_processes": 2, "learning_rate": 1e-4})):
        _, others[name] = new_run(name, **changes)

    def said(iteration: int, config: Path = run.config) -> list[str]:
        told = place.good("train", "--config", config, "--iteration", iteration, "--run", run.path)
        return [line for line in about_trainer(told) if "was written under configuration" not in line]

    assert said(1) == [FRESH]
    team = [rank(place.pool.path, each) for each in (0, 1)]
    assert said(1) == [FRESH]
    assert said(2) == [kept(1)]
    assert said(2) == [loaded(1)]
    assert said(2, others["rate"].config) == [loaded(1)]
    assert [rank(place.pool.path, each) for each in (0, 1)] == team
    assert said(2, others["alone"].config) == [loaded(1)]
    wait_until(lambda: not any(processes.is_alive(pid) for pid in team))
    assert said(2) == [loaded(1)]
    assert said(3) == [kept(2)]
    assert [made_of(run, i) for i in (1, 2, 3)] == [made_of(cold, i) for i in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"reference_offload": True}])
def test_one_process_whose_models_are_split_keeps_them(place, new_run, vocabulary, changes):  # noqa: F811
    _, run = new_run("cold", **changes)
    for iteration in (1, 2, 3, 4):
        write_inputs(run, iteration, vocabulary)
        done = earl(*command(run, iteration))
        assert done.returncode == 0, done.stderr
    _, other = new_run("warm", **changes)
    take_inputs(other, run)
    said = [about_trainer(place.good(*command(other, iteration))) for iteration in (1, 2)]
    assert place.run(*command(other, 5)).returncode == 2, "iteration 4 is missing"
    said += [about_trainer(place.good(*command(other, iteration))) for iteration in (3, 4)]
    assert said == [[FRESH], [kept(1)], [loaded(2)], [kept(3)]]
    assert [made_of(other, i) for i in (1, 2, 3, 4)] == [made_of(run, i) for i in (1, 2, 3, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("who", ["owner", "learner-0"])
def test_ranks_end_with_the_pool_and_with_their_learner(place, cold, new_run, who):  # noqa: F811
    _, run = new_run(train_processes=2)
    take_inputs(run, cold)
    place.good(*command(run, 1))
    team = [rank(place.pool.path, each) for each in (0, 1)]
    if who == "owner":
        place.owner.kill()
        place.owner.communicate()
        wait_until(lambda: not processes_of(place.pool.path))
        assert not Path(place.pool.path).exists()
    else:
        os.kill(place.worker(who), signal.SIGKILL)
        wait_until(lambda: not any(processes.is_alive(pid) for pid in team))
        assert about_trainer(place.good(*command(run, 2))) == [loaded(1)]
        assert made_of(run, 2) == made_of(cold, 2)


@pytest.mark.slow
def test_what_all_ranks_meet_is_said_once_and_the_next_ranks_start_afresh(place, new_run, vocabulary):  # noqa: F811
    _, run = new_run(train_processes=2, parity_tolerance=0.1)
    write_inputs(run, 1, vocabulary)
    plain, warm = earl(*command(run, 1)), place.run(*command(run, 1))
    assert (warm.returncode, warm.stdout) == (plain.returncode, plain.stdout)
    errors = [[line for line in done.stderr.splitlines() if "error" in line.lower()] for done in (plain, warm)]
    assert len(errors[0]) == 1
    assert "more than parity_tolerance" in errors[0][0]
    assert errors[1] == errors[0]
    assert "Traceback" not in warm.stderr
    wait_until(lambda: len(processes_of(place.pool.path)) == 1)  # the learner
    _, good = new_run("good", train_processes=2)
    write_inputs(good, 1, vocabulary)
    assert about_trainer(place.good(*command(good, 1))) == [FRESH]


@pytest.mark.slow
def test_ranks_that_do_not_come_up_leave_the_command_to_torchrun(place, monkeypatch, capfd):  # noqa: F811
    ports = [variables | {"MASTER_PORT": "none"} for variables in local.rank_variables(2)]
    monkeypatch.setattr(local, "rank_variables", lambda count: ports)
    monkeypatch.setenv(pool.VARIABLE, place.pool.path)
    monkeypatch.setenv(processes.WATCHED, "")  # It is set for children; what it was comes back after the test.
    assert local_team.run(["train"], 2) is None
    assert "2 ranks that stay: they do not come up" in capfd.readouterr().err
    assert not processes_of(place.pool.path)


# What ranks do among each other


@contextlib.contextmanager
def team_of(place, size: int, *command: object):  # noqa: F811
    """Start the ranks of `learner-0`, as a job of several tasks would, and yield them once they listen."""
    started = [
        subprocess.Popen([sys.executable, *map(str, command)], env=place.env | variables, stdout=subprocess.DEVNULL)
        for variables in local.rank_variables(size)
    ]
    try:
        wait_until(lambda: Path(place.pool.file("learner-0.json")).exists())
        yield started
    finally:
        for each in started:
            each.kill()
            each.wait()


def ask(place, *argv: object) -> int:  # noqa: F811
    record = pool.Slot(place.pool, "learner-0").record()
    return client.show(channel.connect(record["address"], place.pool.secret), [str(word) for word in argv])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deeds", "status", "said"),
    [
        (["1:fail-together", "0:wait"], 2, "error: rank 1 fails\n"),
        (["1:fail", "0:fail"], 2, "error: rank 0 fails\n"),
        (["0:fail", "1:wait", "2:wait"], 2, "error: rank 0 fails\n"),
        (["2:die", "0:wait"], 1, "error: rank 2 of 3 is gone\n"),
    ],
)
def test_one_rank_tells_how_a_command_failed_and_all_end(place, capfd, deeds, status, said):  # noqa: F811
    with team_of(place, 3, "-m", "tests.support.team_program", place.pool.path, "learner-0") as team:
        assert ask(place, "train", "0:say", "2:say", "1:say") == 0
        assert capfd.readouterr().out == "rank 0 speaks\nrank 1 speaks\nrank 2 speaks\n"
        assert ask(place, "prune", "0:say", "1:fail") == 0, "only the first has to do with that"
        assert capfd.readouterr().out == "rank 0 speaks\n"
        assert ask(place, "train", *deeds) == status
        assert capfd.readouterr().err == said
        for each in team:
            each.wait(timeout=60)


@pytest.mark.slow
def test_rank_0_that_is_killed_and_one_that_ends_in_peace_take_the_others_along(place, capfd):  # noqa: F811
    for number in (signal.SIGKILL, signal.SIGTERM):
        with team_of(place, 3, "-m", "tests.support.team_program", place.pool.path, "learner-0") as team:
            assert ask(place, "train", "1:say") == 0
            team[0].send_signal(number)
            for each in team:
                each.wait(timeout=60)
        pool.Slot(place.pool, "learner-0").end()


@pytest.mark.slow
def test_ranks_of_a_job_serve_as_a_learner(place, cold, new_run, capfd):  # noqa: F811
    _, run = new_run(train_processes=2)
    take_inputs(run, cold)
    worker = ["-m", "earl", "worker", "--pool", place.pool.path, "--name", "learner-0", "--host", "127.0.0.1"]
    with team_of(place, 2, *worker):
        for iteration in (1, 2):
            assert ask(place, *command(run, iteration)) == 0
    assert about_trainer(capfd.readouterr().err) == [FRESH, kept(1)]
    assert [made_of(run, i) for i in (1, 2)] == [made_of(cold, i) for i in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "kind"), [(2, "learner"), (1, "ranks")])
def test_ranks_stay_in_slurm_jobs(slurm, cold, new_run, tmp_path, nodes, kind):
    """As the tasks of a job on two nodes, and as processes that a job of one task starts."""
    _, run = new_run(train_processes=2)
    take_inputs(run, cold)
    with slurm_workplace(tmp_path, slurm) as place:  # noqa: F811

        def said(iteration: int) -> list[str]:
            return about_trainer(place.good(command(run, iteration), nodes=nodes, tasks_per_node=1))

        assert [said(1), said(2)] == [[FRESH], [kept(1)]]
        assert list(place.workers()) == ["learner"]
        team = [rank(place.pool.path, each, kind) for each in (0, 1)]
        os.kill(team[1], signal.SIGKILL)
        wait_until(lambda: not processes.is_alive(team[0]))
        assert said(3) == [loaded(2)]
    assert not processes_of(place.pool.path)
    assert [made_of(run, i) for i in (1, 2, 3)] == [made_of(cold, i) for i in (1, 2, 3)]
