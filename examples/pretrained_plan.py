"""A pretrained model with a plan: measured on one text, used on another, compared with the exact model.

    python examples/pretrained_plan.py                                   # under a minute
    python examples/pretrained_plan.py --calibrate 8192 --prompt 8192    # where it pays; some minutes

SmolLM2-135M comes from its Python package, nothing is downloaded. `calibrate` measures for every head how
little it may look at; `apply_plan` lets the model attend to long prompts by that, and checks every head on
every prompt. At the short lengths of the default the plan changes little and saves nothing; `--prompt` at
thousands of tokens is what it is for.
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


@torch.no_grad()
def answer(model: Any, prompt: Tensor, count: int) -> tuple[Tensor, Tensor, float]:
    """Return the logits after the prompt, new tokens, and the seconds until the first of them."""
    ones = torch.ones_like(prompt)
    begin = time.perf_counter()
    logits = model(prompt, attention_mask=ones, logits_to_keep=1).logits[0, -1]
    seconds = time.perf_counter() - begin
    ids = model.generate(prompt, attention_mask=ones, max_new_tokens=count, do_sample=False)
    return logits.log_softmax(-1), ids[0, prompt.shape[1] :], seconds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibrate", type=int, default=1024, help="tokens to measure on")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--text", type=Path, help="UTF-8 text of the prompt")
    parser.add_argument("--tolerance", type=float, default=0.2, help="relative error of a head")
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
        plan = cb.calibrate(model, ids, tolerance=options.tolerance)
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
        f"prompt of {options.prompt:,} tokens: {seconds:.2f} s by the plan, {exact_seconds:.2f} s exactly"
    )
    print(
        f"heads of {report.prefills} prompts: {report.heads_approximated} approximated, "
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
