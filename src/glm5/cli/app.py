"""The command line: `glm5 chat | generate | train | quantize | info`, each a thin call of the API.

Heavy imports happen inside the commands, so that help is instant. What a user can act on is one
line on stderr and exit code 2.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from glm5.cli import streams
from glm5.errors import Glm5Error

app = typer.Typer(
    name="glm5",
    help="GLM-5-family sparse language models on the machines you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="PATH", help="Checkpoint directory or hub name; default: embedded."
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="auto (as stored), float32, float16, bfloat16; default: fastest.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda:N.")]
MaxTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Longest answer, in tokens.")]
Temperature = Annotated[float | None, typer.Option(help="0 = greedy; default: the checkpoint's.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the K likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this total.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens below this share of the best.")]
Penalty = Annotated[float | None, typer.Option(help="Above 1: repeat less.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same answer.")]
Thinking = Annotated[bool | None, typer.Option("--think/--no-think", help="Reason before the answer.")]


@app.command()
def chat(
    path: Annotated[str | None, typer.Argument(help="As --model.", show_default=False)] = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="A system message for every turn.")] = None,
    think: Thinking = None,
    max_new_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = "auto",
    cache_dir: Annotated[
        Path | None, typer.Option(help="Keep what was read of prompts in this folder.", metavar="DIR")
    ] = None,
) -> None:
    """Talk to a model. From a pipe: one line in, one answer out."""
    from glm5.cli.chat import run_piped, run_terminal
    from glm5.cli.conversation import ChatSession

    if path is not None and model is not None:
        raise typer.BadParameter(f"two models are named, {path} and {model}; name one")
    model = model if path is None else path
    params = _sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    loaded = _load(model, dtype, device)
    if cache_dir is not None:
        loaded.start_engine(cache_dir=cache_dir)
    session = ChatSession(
        loaded, system=system, enable_thinking=think, max_new_tokens=max_new_tokens, **params
    )
    if sys.stdin.isatty():
        run_terminal(session, model or "the embedded model")
    elif not run_piped(session, sys.stdin, sys.stdout, sys.stderr):
        raise typer.Exit(2)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from the input.")],
    model: Model = None,
    as_chat: Annotated[bool, typer.Option("--chat", help="Take the prompt as a user's message.")] = False,
    think: Thinking = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be repeated.")] = None,
    max_new_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    dtype: Dtype = None,
    device: Device = "auto",
) -> None:
    """Continue a text."""
    params = _sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    text = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
    loaded = _load(model, dtype, device)
    asked: Any = [{"role": "user", "content": text}] if as_chat else text
    pieces = loaded.stream(
        asked,
        enable_thinking=think,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
        **params,
    )
    for piece in pieces:
        sys.stdout.write(streams.shown(piece, sys.stdout))
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or a shipped recipe: nano, smoke.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. run.steps=100."),
    ] = None,
) -> None:
    """Train a model. Ctrl-C saves; the same command goes on."""
    from glm5.training.recipe import parse_change, read_recipe

    settings = read_recipe(recipe, dict(parse_change(change) for change in changes or []))
    from glm5.training.loop import Trainer

    trainer = Trainer(settings)
    streams.interruptible()
    snapshot = trainer.train()
    if trainer.step < settings.run.steps:
        typer.echo(
            f"stopped at step {trainer.step} of {settings.run.steps}; run the same command to go on", err=True
        )
        raise typer.Exit(130)
    typer.echo(str(snapshot))


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="Checkpoint directory (bf16, FP8, int4 of others) or .gguf.")],
    destination: Annotated[Path, typer.Argument(help="Directory to write.")],
    bits: Annotated[int, typer.Option(help="4 or 8, for every linear layer.")] = 4,
    group: Annotated[
        int | None,
        typer.Option(help="Columns that share a scale: 32, 64, 128; default: the widest that fits."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="PATTERN=BITS[:GROUP]", help="Other bits for some modules: '*.self_attn.*=8'."
        ),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave these modules as they are.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="nearest: each weight by itself; gptq: on what a text makes of the inputs.")
    ] = "nearest",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE.txt", help="Text for gptq; may be repeated; default: a shipped one."),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of it to use; default: 16384.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an unfinished job away.")] = False,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Compare answers with the source's, which must fit in memory.")
    ] = False,
) -> None:
    """Write an int4 checkpoint that glm5, transformers and vLLM load. Goes on where it was stopped."""
    from glm5.cli.bars import loading_bar
    from glm5.config import ModelConfig
    from glm5.hub import resolve
    from glm5.quantize import Recipe, quantize, widest_group
    from glm5.quantize.calibration import calibration_of

    path = Path(source) if source.lower().endswith(".gguf") else resolve(source)
    if group is None:
        group = widest_group(ModelConfig.from_pretrained(path)) if path.is_dir() else 64
    recipe = Recipe.of(bits, group, changes or [], keep or [])
    text = calibration_of(path, method, calibration or [], calibration_tokens)
    streams.interruptible()
    try:
        with loading_bar("quantizing") as progress:
            receipt = quantize(
                path, destination, recipe, calibration=text, restart=restart, progress=progress
            )
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on, --restart begins anew ({destination})", err=True)
        raise typer.Exit(130) from None
    typer.echo(
        f"{destination}: {receipt['total_bytes'] / 1e9:.3g} GB from {receipt['source_bytes'] / 1e9:.3g} GB, "
        f"{receipt['bits_per_quantized_weight']} bits a quantized weight, "
        f"{receipt['bytes_per_token'] / 1e6:.4g} MB a token\ntalk to it: glm5 chat {destination}"
    )
    if evaluate:
        from glm5.evaluation.compare import evaluate as compare

        for language, found in compare(path, destination).items():
            typer.echo(
                f"{language}: KL {found['kl']:.4f} nats, same best token {found['top1']:.1%}, "
                f"perplexity {found['perplexity'][0]:.2f} -> {found['perplexity'][1]:.2f}"
            )


@app.command()
def info(
    path: Annotated[str, typer.Argument(help="Checkpoint directory, config.json or preset (glm-5).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model's architecture, parameters by part and bytes by dtype."""
    from glm5.cli.info import describe, print_description

    description = describe(path)
    if as_json:
        import json

        typer.echo(json.dumps(description, indent=2, ensure_ascii=False))
    else:
        print_description(description)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    if version:
        from glm5 import __version__

        typer.echo(f"glm5 {__version__}")
        raise typer.Exit


def _sampling(*values: float | None) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    given = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    from glm5.runtime.sampling_params import SamplingParams

    SamplingParams(**given)  # type: ignore[arg-type]  # refuse before the model is loaded
    return given


def _load(model: str | None, dtype: str | None, device: str) -> Any:
    import glm5
    from glm5.cli.bars import loading_bar

    with loading_bar() as progress:
        loaded = glm5.load(
            Path(model) if model and Path(model).exists() else model,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    streams.interruptible()
    return loaded


def main() -> None:
    """Entry point of the `glm5` command."""
    streams.prepare()
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if sys.stdout is None:
        _fail("standard output is closed; send it to a file or /dev/null")
    try:
        try:
            app()
        finally:
            streams.finish()
    except Glm5Error as error:
        _fail(str(error))
    except UnicodeDecodeError as error:
        _fail(f"the input is not {error.encoding} at byte {error.start}; convert it, e.g. with iconv")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        streams.give_up_output()
        if streams.is_gone(error):
            sys.exit(0)
        _fail(f"{error.filename or 'the output'}: {error.strerror}")
    except SystemExit:
        if type(sys.stdout).__name__ == "PacifyFlushWrapper":  # typer met a reader who had left
            streams.give_up_output()
            sys.exit(0)
        raise


def _fail(message: str) -> NoReturn:
    with suppress(OSError):
        typer.echo(f"error: {message}", err=True)
    sys.exit(2)
