"""A language model that sees, asked about pictures: VQAScore, and answers to questions."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from emu_lightning.evaluation.metrics.embedders import (
    Network,
    Pictures,
    default_device,
    load_transformers,
    to_pil,
)
from emu_lightning.evaluation.metrics.picture_scorers import PictureScorer, Scores
from emu_lightning.weights import (
    VOCABULARY_FILES,
    checkpoint_files,
    find_in,
    find_weights,
    first_line,
    label,
    sha256,
)


class VisionLanguageModel:
    """A model of transformers that answers a question about a picture: LLaVA, Qwen-VL, PaliGemma, ...

    Where it has a template for chats, the question is put into it. Pictures are asked about one by one, so
    that an answer does not depend on padding.

    Args:
        weights: folder or hub id, with its processor.
        precision: of weights and computation.
        device: where it runs; None is the GPU where there is one.
    """

    def __init__(
        self, weights: str, precision: Literal["float32", "bfloat16"] = "float32", device: str | None = None
    ) -> None:
        self.weights, self.precision, self.device = weights, precision, device

    @property
    def network(self) -> Network:
        import transformers

        files = checkpoint_files(find_weights(self.weights))
        by = f"{type(self._processor).__name__} of transformers {transformers.__version__}, {self.precision}"
        return Network(f"transformers {label(self.weights)}", sha256(*files), by)

    def probability(self, image: Image.Image, question: str, answer: str) -> float:
        """That the first token of the answer is `answer`, among all tokens.

        Raises:
            ValueError: the model spells `answer` by several tokens.
        """
        ids = self._processor.tokenizer(answer, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ValueError(
                f"{label(self.weights)} spells {answer!r} by {len(ids)} tokens: ask for another answer"
            )
        return float(self._generate(image, question, 1).logits[0][0].float().softmax(dim=-1)[ids[0]])

    def answer(self, image: Image.Image, question: str, max_tokens: int = 16) -> str:
        """The most probable answer, token by token."""
        output = self._generate(image, question, max_tokens)
        made = output.sequences[0, -len(output.logits) :]  # some models repeat the question in front
        return str(self._processor.tokenizer.decode(made, skip_special_tokens=True)).strip()

    def _generate(self, image: Image.Image, question: str, num_tokens: int) -> Any:
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
            inputs = self._processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,  # here, where a start token of the template is not set twice
                return_dict=True,
                return_tensors="pt",
            )
        else:
            inputs = self._processor(images=image, text=question, return_tensors="pt")
        inputs = inputs.to(self._network.device, self._network.dtype)
        with torch.inference_mode():
            return self._network.generate(
                **inputs,
                max_new_tokens=num_tokens,
                do_sample=False,
                num_beams=1,
                output_logits=True,
                return_dict_in_generate=True,
            )

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoProcessor

        folder = find_weights(self.weights)
        find_in(folder, VOCABULARY_FILES, "tokenizer")
        try:
            return AutoProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers and json each raise their own kinds
            raise ValueError(f"{folder} holds no processor: {first_line(error)}") from None

    @cached_property
    def _network(self) -> Any:
        from transformers import AutoModelForImageTextToText

        folder = find_weights(self.weights)
        checkpoint_files(folder)
        try:
            network = load_transformers(AutoModelForImageTextToText, folder, getattr(torch, self.precision))
        except Exception as error:  # torch, safetensors and transformers each raise their own kinds
            raise ValueError(f"{folder} holds no model that answers: {first_line(error)}") from None
        return network.eval().to(default_device(self.device))


class VQAScore(PictureScorer):
    """VQAScore: the probability of "Yes" when asked whether the picture shows the prompt (Lin et al. 2024).

    In [0, 1]. Published is CLIP-FlanT5-XXL; another model gives another score, and so does another template.

    Args:
        model: is asked.
        question: with {} for the prompt; the default is the published one.
        answer: whose probability is the score.
    """

    name = "VQAScore"
    range = (0.0, 1.0)

    def __init__(
        self,
        model: VisionLanguageModel,
        question: str = 'Does this figure show "{}"? Please answer yes or no.',
        answer: str = "Yes",
    ) -> None:
        if "{}" not in question:
            raise ValueError(f"the question {question!r} has no {{}} for the prompt")
        self.model, self.question, self.answer = model, question, answer

    @property
    def networks(self) -> tuple[Network, ...]:
        return (self.model.network,)

    def _score(self, images: Pictures, prompts: list[str]) -> Scores:
        questions = [self.question.replace("{}", prompt) for prompt in prompts]
        return np.array(
            [
                self.model.probability(image, question, self.answer)
                for image, question in zip(to_pil(images), questions, strict=True)
            ]
        )
