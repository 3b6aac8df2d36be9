"""Prompt and output lengths of saturated runs, which mostly give a mean output and no more."""

from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from calibrate.tables.measured_runs import MeasuredRun

PROMPT_STD_TOKENS = 8.0
"""Of prompt lengths where a row gives only their mean: what runs with recorded lengths by that load generator have."""

CHAT_LENGTHS = 250.0, 7.5, 0.8
REASONING_LENGTHS = 250.0, 0.5, 0.3
"""Mean prompt tokens, and coefficients of variation of prompt and output lengths, where a saturated run gives only the
mean output; all lognormal. Inferred from two things the runs tell, not measured:

- ITL of Llama 3.1 70B on four H100 at batch 128: a tenth of the iterations last 6 ms longer than the median, a
  hundredth 95 ms, at 0.37 new prompts an iteration and about 58 us a prompt token: a lognormal of median 30 and mean
  250 tokens.
- Engines whose batch stays below its limit because KV memory is full hold on average prompt + output / 2 * (1 + cv^2)
  tokens a request: about 790, 860, 820 and 610 at mean outputs of 645, 627, 627 and 397 in four chat runs, and 4,570 at
  8,052 in a run of exam questions (workload ``gpqa``)."""

LONGEST_CHAT_PROMPT_TOKENS = 8192

_QUANTILES = (np.arange(4096) + 0.5) / 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SaturatedLengths:
    """Lengths of a saturated run: lognormal, cut where they would not fit.

    Attributes:
        prompt_mean, prompt_cv: before the cut; likewise of outputs.
        longest_prompt: tokens; likewise ``longest_output``.
        notes: what was assumed.
    """

    prompt_mean: float
    prompt_cv: float
    output_mean: float
    output_cv: float
    longest_prompt: int
    longest_output: int
    notes: tuple[str, ...]

    def prompts(self, normal: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return prompt lengths from standard normal draws."""
        return _lognormal(self.prompt_mean, self.prompt_cv, self.longest_prompt, normal)

    def outputs(self, normal: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return output lengths from standard normal draws."""
        return _lognormal(self.output_mean, self.output_cv, self.longest_output, normal)

    def context_in_flight_tokens(self) -> float:
        """Return the mean tokens of context of a request in flight, its output half written.

        A request is in flight for as long as its output, so that long ones weigh more: the output counts with its mean
        square over twice its mean. Prompts are independent of outputs.
        """
        normal = ndtri(_QUANTILES)
        prompt, output = self.prompts(normal).astype(float), self.outputs(normal).astype(float)
        return float(prompt.mean() + np.square(output).mean() / (2 * output.mean()))


def saturated_lengths(run: MeasuredRun, max_model_len: int) -> SaturatedLengths:
    """Return the lengths of a saturated run, for its replay and its fit alike."""
    notes = []
    prompt_mean, prompt_cv, output_cv = REASONING_LENGTHS if "gpqa" in run.workload.casefold() else CHAT_LENGTHS
    if isfinite(run.prompt_tokens_mean):
        prompt_mean = run.prompt_tokens_mean
        prompt_std = run.prompt_tokens_std if isfinite(run.prompt_tokens_std) else PROMPT_STD_TOKENS
        prompt_cv = prompt_std / prompt_mean
    else:
        notes.append(f"prompts assumed lognormal, mean {prompt_mean:g}, cv {prompt_cv:g}")
    if isfinite(run.output_tokens_std):
        output_cv = run.output_tokens_std / run.output_tokens_mean
    else:
        notes.append(f"outputs assumed lognormal, cv {output_cv:g}")
    return SaturatedLengths(
        prompt_mean=prompt_mean,
        prompt_cv=prompt_cv,
        output_mean=run.output_tokens_mean,
        output_cv=output_cv,
        longest_prompt=min(LONGEST_CHAT_PROMPT_TOKENS, max_model_len // 4),
        longest_output=max_model_len // 2,
        notes=tuple(notes),
    )


def _lognormal(mean: float, cv: float, longest: int, normal: NDArray[np.float64]) -> NDArray[np.int64]:
    variance = np.log1p(cv**2)
    lengths = np.rint(mean * np.exp(np.sqrt(variance) * normal - variance / 2))
    return np.asarray(np.clip(lengths, 1, longest), np.int64)
