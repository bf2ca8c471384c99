"""The command line: finds the verb, imports only what it needs, and ends every user error in one line.

Nothing heavy may be imported here: Lightning alone takes seconds, and `emu --help` must answer at once.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
from argparse import ArgumentError
from typing import NoReturn

from emu_lightning import __version__

# verb -> (module in emu_lightning.verbs, what it does)
VERBS: dict[str, tuple[str, str]] = {
    "quickstart": ("quickstart", "the whole job in minutes: select, quality-tune, judge, write report.html"),
    "fit": ("train", "train a stage: autoencoder, generator or quality-tuning"),
    "validate": ("train", "compute a stage's validation metrics"),
    "test": ("train", "compute a stage's test metrics"),
    "predict": ("train", "run a stage over data and keep what it returns"),
    "cache": ("cache", "encode pictures and captions once, before training: latents and text embeddings"),
    "sample": ("sample", "generate images for prompts"),
    "evaluate": ("evaluate", "judge two models by people's votes or by scorers; prompts, pictures, reports"),
    "curate": ("curate", "select the pictures of a pool that are worth tuning on; one page says why"),
    "annotate": ("annotate", "ask people: screening, photography review, captions, A/B judging"),
    "head": ("head", "learn from labels of some pictures what a curation finds in all"),
    "upsample": ("upsample", "bring pictures of a manifest that are too small up to a size"),
    "export": ("export", "write a checkpoint as a folder of safetensors"),
    "miniature": ("miniature", "make a miniature base model from nothing"),
    "sweep": ("sweep", "run a W&B sweep file on this machine, without a server"),
    "dashboard": ("dashboard", "put runs side by side: ablations, stops, pictures, curves; one page"),
    "generators": ("generators", "tune and judge every carried base: latent, pixel, masked; one page"),
}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: list[str] | None = None) -> None:
    """Run `emu`.

    Args:
        argv: what follows `emu` on the command line; `sys.argv[1:]` when None.

    Raises:
        SystemExit: 2 after a user error (one line on stderr; set EMU_TRACEBACK=1 to see where it
            arose), 130 after Ctrl-C, 143 after SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return
    if argv[0] in ("-V", "--version"):
        print(f"emu_lightning {__version__}")
        return
    verb, *rest = argv
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`emu --help` lists the verbs"
        fail(f"{verb!r} is not a verb: {hint}")
    target, _ = VERBS[verb]
    # Where torchao is installed two complain; the third says of a hub out of reach what the error says, too.
    for name in ("torch.utils._pytree", "diffusers.quantizers", "diffusers.pipelines.pipeline_utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        module = importlib.import_module(f"emu_lightning.verbs.{target}")
        module.main(rest if target == verb else [verb, *rest])  # a module of several verbs is told which
    except KeyboardInterrupt:
        print("emu: interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except (ValueError, OSError, ArgumentError) as error:
        if os.environ.get("EMU_TRACEBACK") == "1":
            raise
        fail(str(error) or type(error).__name__)


def overview() -> str:
    """What `emu --help` prints: the verbs, one line each."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {help_line}" for verb, (_, help_line) in VERBS.items())
    return f"""emu {__version__}: quality-tuning of text-to-image models, end to end

usage: emu VERB [options]        (emu VERB --help lists a verb's options)

{verbs}

first steps:  emu quickstart
your photos:  emu fit --config configs/quality_tuning/folder.yaml --data.path DIR"""


def fail(message: str) -> NoReturn:
    """End with one line on stderr and exit code 2."""
    if "Traceback (most recent call last)" in message:  # an error that a data worker handed over
        message = message.strip().splitlines()[-1].partition(": ")[2] or message
    print(f"emu: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(EXIT_USER_ERROR)
