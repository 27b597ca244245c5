"""Reports for tests: a full one as of a real model, and a hostile one."""

import math

from convbasis.report.content import (
    Chart,
    HeadMap,
    HeadView,
    Line,
    Provenance,
    Report,
    Source,
    Table,
)

HOSTILE = "<script>alert(1)</script>"
LAYERS, HEADS, SIZE = 30, 9, 48
WORDS = ("exact", "window 128", "window 256, means of 64", "sinks 4 and columns 60")


def error_of(layer, head):
    return 0.0005 * math.exp(3 * math.sin(layer * 1.7 + head * head) + layer / 12)


def attention(layer, head, blur):
    """Return a causal matrix with a sink, a diagonal and a bump whose place the head decides."""
    rows = []
    for query in range(SIZE):
        logits = [
            3 * (key == 0) - (query - key) / (2 + head + blur) + 2 * ((query - key) % (5 + layer) == 0)
            for key in range(query + 1)
        ]
        weights = [math.exp(logit) for logit in logits]
        total = sum(weights)
        rows.append(tuple(w / total for w in weights) + (0.0,) * (SIZE - query - 1))
    return tuple(rows)


def view(layer, head, approximated=True):
    return HeadView(
        layer=layer,
        head=head,
        caption=f"The last {SIZE} tokens of the prompt; kernel of layer {layer}, head {head}.",
        exact=attention(layer, head, 0.0),
        approximate=attention(layer, head, 0.7) if approximated else None,
        lags=(0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
        lag_weights=tuple(
            0.4 / (1 + lag) ** (1 + head / 10) for lag in (0, *(2**i for i in range(12)))
        ),
    )


def provenance(model="SmolLM2-135M"):
    return Provenance(
        command="convbasis heads --model smollm2 --text prose.txt --length 8192",
        created="2026-05-04T10:20:30Z",
        versions={"convbasis": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        threads=2,
        machine="AMD EPYC, 2 cores",
        model=model,
        sources=(Source("prose.txt", 8192, "ab" * 32), Source("code.py", 8192, "cd" * 32)),
    )


def full_report(model="SmolLM2-135M"):
    """Return a report with every part, of the size of a small real model."""
    errors = tuple(tuple(error_of(layer, head) for head in range(HEADS)) for layer in range(LAYERS))
    settings = tuple(
        tuple(None if e > 0.09 else WORDS[int(e * 1e4) % 4] for e in row) for row in errors
    )
    tokens = (1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0)
    speed = Chart(
        title="Attention against exact attention",
        x_title="tokens",
        y_title="times faster",
        lines=(
            Line("plan", tokens, (0.7, 1.0, 1.3, 1.62, 2.4, 4.1)),
            Line("one setting for all heads", tokens, (0.6, 0.9, 1.4, 2.1, 3.3, 6.2)),
        ),
        x_log=True,
        y_log=True,
        level=(1.0, "no faster"),
    )
    quality = Chart(
        title="Time against distance from the exact model",
        x_title="time of the prompt, seconds",
        y_title="KL to the exact model, nats",
        lines=(
            Line(
                "one setting for all heads",
                (3.1, 3.9, 5.2, 6.6),
                (0.21, 0.0811, 0.0275, 0.0102),
                ("window 128", "window 256", "window 512", "window 1024"),
                joined=False,
            ),
            Line("plans", (4.0, 4.7, 5.9), (0.0091, 0.0024, 0.0009), ("0.2", "0.1", "0.05")),
        ),
        y_log=True,
        marked=(4.7, 0.0024, "this plan"),
    )
    return Report(
        title="What a plan saves, head by head",
        provenance=provenance(model),
        summary=(
            ("Attention faster", 1.62),
            ("Whole prompt faster", 1.41),
            ("Perplexity", "+0.16 %"),
            ("KL to the exact model, nats", 0.0024),
            ("Heads approximated", 182),
            ("Tokens", 8192),
        ),
        maps=(
            HeadMap("Estimated error of each head", "relative L2 error", errors),
            HeadMap("What each head computes", "", settings),
        ),
        heads=(
            *(view(*place) for place in ((0, 0), (0, 1), (3, 4), (14, 2), (28, 8))),
            view(29, 0, approximated=False),
        ),
        charts=(speed, quality),
        tables=(
            Table(
                "Texts that the plan did not see",
                ("text", "tokens", "perplexity, exact", "perplexity, plan", "KL, nats", "worst head"),
                (
                    ("prose", 8192, 14.213, 14.235, 0.0024, "layer 12, head 3"),
                    ("code", 8192, 3.871, 3.893, 0.0031, "layer 7, head 8"),
                    ("dialogue", 4096, 21.55, None, 1.2e-05, None),
                ),
            ),
        ),
        notes=(
            "Times are medians of five interleaved runs on a shared machine; ratios vary by 10 %.",
            "Perplexity of dialogue was not measured: the text is shorter than the plan's crossover.",
        ),
    )


def hostile_report():
    """Return a report whose every text tries to be markup."""
    bad = HOSTILE
    line = Line(f"{bad}<b>bold</b>", (1.0, 2.0), (1.0, 2.0), (bad, "</script>"))
    return Report(
        title=f"t {bad}",
        provenance=Provenance(
            f"c {bad}", f"d {bad}", {bad: bad}, 1, bad, bad, (Source(bad, 1, bad),)
        ),
        summary=((bad, bad), ("--><img src=x onerror=alert(2)>", 1)),
        maps=(HeadMap(bad, bad, ((bad, None), ('" onfocus="alert(3)', "b"))),),
        heads=(HeadView(0, 0, bad, ((1.0,),), ((1.0,),), (0,), (1.0,)),),
        charts=(
            Chart(bad, f"{bad} %{{x}}", bad, (line,), marked=(1.0, 1.0, bad), level=(1.0, bad)),
        ),
        tables=(Table(bad, (bad,), ((bad,), ("&lt;&amp;",))),),
        notes=(bad,),
    )  # fmt: skip


def odd_report():
    """Return a report at the edges of what can be drawn."""
    matrix = ((0.0, 0.0), (0.0, 0.0))
    empty = Chart("no lines", "x", "y", (), x_log=True, y_log=True)
    below = Chart(
        "not on these axes",
        "x",
        "y",
        (Line("l", (0.0, 1.0), (-1.0, 0.0)), Line("none", (), ())),
        x_log=True,
        y_log=True,
        marked=(0.0, 0.0, "the point"),
        level=(0.0, "the level"),
    )
    return Report(
        title="",
        provenance=Provenance("", "", {}, 1, ""),
        maps=(
            HeadMap("nothing", "", ((None,), (None,))),
            HeadMap("one value", "", ((2.0,), (2.0,))),
            HeadMap("fewer layers", "", ((-1e300,),)),
        ),
        heads=(
            HeadView(1, 0, "zero", matrix, matrix, (), ()),
            HeadView(7, 7, "in no map", ((1.0,),), None, (0, 3), (0.0, 0.0), first=960, tile=64),
        ),
        charts=(empty, below),
        tables=(Table("empty", (), ()), Table("no rows", ("a",), ())),
    )
