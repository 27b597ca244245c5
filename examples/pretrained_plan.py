"""A pretrained model with a plan: measured on one text, used on another, compared with the exact model.

    python examples/pretrained_plan.py                                             # under a minute
    python examples/pretrained_plan.py --calibrate 8192 --prompt 8192 --full-ladder   # where it pays

SmolLM2-135M comes from its Python package, nothing is downloaded. `calibrate` measures for every head
how little it may look at; `apply_plan` lets the model attend to long prompts by that, and checks every
head on every prompt. The default tries two settings only, on 2,048 tokens, where little is gained or
lost; at 1,024 exact attention is the fastest of all, and no head is approximated.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import convbasis as cb
from convbasis.integrations.smollm2 import load_smollm2, sample_text, token_ids
from convbasis.plan import HeadSetting, Size


def short_ladder(length: int) -> list[HeadSetting]:
    """Return two settings: the cheapest, and what many heads need."""
    window = Size(length // 8, length, power=0.5, multiple=64)
    columns = Size(length // 32, length, power=0.5, multiple=4)
    return [HeadSetting(window, columns=0), HeadSetting(window, columns=columns)]


def answer(model: Any, prompt: Tensor, count: int) -> tuple[Tensor, Tensor, float]:
    """Return log-probabilities after the prompt, the new tokens, and the seconds that they took."""
    begin = time.perf_counter()
    done = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - begin
    return done.logits[0][0].log_softmax(-1), done.sequences[0, prompt.shape[1] :], seconds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibrate", type=int, default=2048, help="tokens to measure on")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--text", type=Path, help="UTF-8 text of the prompt")
    parser.add_argument("--tolerance", type=float, default=0.2, help="relative error of a head")
    parser.add_argument("--full-ladder", action="store_true", help="try all settings of `calibrate`")
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--plan", type=Path, help="file to keep the plan in, or to take it from")
    options = parser.parse_args(arguments)
    loaded = load_smollm2()
    model, tokenizer = loaded.model, loaded.tokenizer
    begin = time.perf_counter()
    if options.plan is not None and options.plan.exists():
        plan = cb.Plan.load(options.plan)
    else:
        ids = token_ids(tokenizer, sample_text(), options.calibrate)
        ladder = None if options.full_ladder else short_ladder(options.calibrate)
        plan = cb.calibrate(model, ids, tolerance=options.tolerance, ladder=ladder)
        if options.plan is not None:
            plan.save(options.plan)
    print(f"{plan}, {time.perf_counter() - begin:.1f} s")
    print(f"faster than exact attention beyond {plan.min_length:,} tokens, as measured here")
    # The second half of the same prose is another text than the one that was measured.
    text = sample_text(options.text)
    prompt = token_ids(tokenizer, text if options.text else text[len(text) // 2 :], options.prompt)
    exact, exact_ids, exact_seconds = answer(model, prompt, options.new_tokens)
    cb.apply_plan(model, plan, min_length=min(plan.min_length, options.prompt - 1))
    planned, planned_ids, seconds = answer(model, prompt, options.new_tokens)
    report = cb.plan_report(model)
    cb.remove_plan(model)
    print(
        f"prompt of {options.prompt:,} tokens and {options.new_tokens} new ones: {seconds:.2f} s by "
        f"the plan, {exact_seconds:.2f} s exactly"
    )
    print(
        f"heads: {report.heads_approximated} approximated, "
        f"{report.heads_exact} exact by the plan, {report.heads_fallen_back} computed again exactly"
    )
    divergence = float((exact.exp() * (exact - planned)).sum())
    print(f"next token: divergence (KL) from the exact model {divergence:.4f} nats")
    same = int((exact_ids == planned_ids).long().cumprod(0).sum())
    print(f"greedy tokens alike: the first {same} of {options.new_tokens}")
    for name, found in (("exact", exact_ids), ("plan", planned_ids)):
        print(f"{name:>6}: {tokenizer.decode(found)!r}")


if __name__ == "__main__":
    main()
