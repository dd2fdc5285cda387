"""Rollouts with pictures of the shapes world, and configurations that judge them, for the tests of model judges."""

from pathlib import Path

from earl.config.schema import Config
from earl.files import images, tables
from earl.judges import known_order
from tests.support.evaluation_files import demo_config, episode


def config(folder: Path, model: str, **changes) -> Config:
    """The demo's configuration with a judge that asks `model`; its store of judgements lies in `folder`."""
    asked = {"judge": "vllm", "reward_function_api_model_name": model, "base_exp_dir": str(folder)}
    return Config.model_validate(demo_config().model_dump() | asked | changes)


def write_rollouts(path: Path, examples: int, *more: dict) -> list[dict]:
    """Write four edits of each example, best last, an episode without an image, and the first one changed as `more`
    says; return the rows."""
    rows = []
    for index, ranked in enumerate(known_order.of_shapes(examples, seed=5)):
        asked = ranked.judgement
        pictures = {name: _struct(getattr(asked, name)) for name in ("original", "target", "edited")}
        rows.append(episode(index // 4, None, index % 4, instruction=asked.instruction, **pictures))
    rows.append(rows[0] | {"episode_id": "p-cut", "finish_reason": "length", "edited": None})
    rows += [rows[0] | changes for changes in more]
    columns = {name: [row[name] for row in rows] for name in tables.ROLLOUTS.names}
    tables.write_table(path, tables.ROLLOUTS, columns, {"run": "r", "policy_digest": "ab12"}, largest_token=300)
    return rows


def _struct(pixels) -> dict:
    return images.struct(images.encode(pixels))
