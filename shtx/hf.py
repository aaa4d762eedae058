"""The models as ones of Hugging Face's transformers: Trainer, generate, save_pretrained.

Importing this page registers them, so that AutoModelForCausalLM.from_pretrained finds them. It
comes with the extra `hf`.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shtx import model as version_2
from shtx import next_latent as version_4
from shtx.initial import draw
from shtx.internals import mark_as_initialized
from shtx.losses import LEFT_OUT, means_of_columns
from shtx.model import Trunk
from shtx.ops import cross_entropy

KINDS = {
    kind.version: kind
    for kind in (version_2.HierarchicalTransformer, version_4.HierarchicalTransformer)
}
SMALL = dict(num_tokens=256, dim=512, depth=6)  # what a constructor has no default for

NEW_TOKENS = 20  # and the 50 most likely ones, if nothing is said: what transformers does
TOP_K = 50
TAKEN = (  # fields of a GenerationConfig
    *("max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "num_return_sequences", "use_cache"),
    "transformers_version",
)
NEUTRAL = dict(  # what changes nothing, and may be said
    num_beams=1,
    num_beam_groups=1,
    repetition_penalty=1.0,
    length_penalty=1.0,
    typical_p=1.0,
    encoder_repetition_penalty=1.0,
)


def options_of(version: str) -> dict:
    """The arguments of the model of a version, with their defaults."""
    if version not in KINDS:
        raise ValueError(f"version must be {' or '.join(map(repr, KINDS))}, got {version!r}")
    parameters = list(inspect.signature(KINDS[version].__init__).parameters.values())[1:]
    return {p.name: SMALL.get(p.name, p.default) for p in parameters}


class HierarchicalConfig(PreTrainedConfig):
    """The arguments of a model, by their names.

    Args:
        version: "0.2.0" for those of `shtx.HierarchicalTransformer`, "0.4.0" for those of
            `shtx.next_latent.HierarchicalTransformer`.
        **kwargs: the arguments, with the defaults of the model, but for ignore_index, which is
            -100: transformers counts all other labels. num_tokens is 256, dim 512 and depth 6.

    Raises:
        ValueError: for another version, or an argument that no file can keep.
    """

    model_type = "shtx"
    attribute_map = {
        "vocab_size": "num_tokens",
        "max_position_embeddings": "seq_len",
        "num_hidden_layers": "depth",
    }

    def __init__(self, version: str = "0.2.0", **kwargs):
        self.version = version
        for name, default in (options_of(version) | dict(ignore_index=LEFT_OUT)).items():
            mapped = {ours: theirs for theirs, ours in self.attribute_map.items()}.get(name, name)
            value = kwargs.pop(name, kwargs.pop(mapped, default))
            parts = value if isinstance(value, (tuple, list)) else [value]
            if not all(isinstance(part, (int, float, str, type(None))) for part in parts):
                raise ValueError(f"{name} must be what a file can keep, got {value!r}")
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """The embedding's width."""
        return max(self.dim) if isinstance(self.dim, list) else self.dim

    def make_model(self) -> Trunk:
        return KINDS[self.version](
            **{name: getattr(self, name) for name in options_of(self.version)}
        )


class HierarchicalTransformerForCausalLM(PreTrainedModel, GenerationMixin):
    """A hierarchical transformer for transformers.

    Attributes:
        model: the `shtx.HierarchicalTransformer`, or that of `shtx.next_latent`, with all that it
            can do besides: `model.graphs`, `model.generate`, TrainStep.
    """

    config_class = HierarchicalConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True
    # its levels meet in every layer: several devices have the whole of it, or a share by FSDP
    _no_split_modules = ["HierarchicalTransformer"]

    def __init__(self, config: HierarchicalConfig):
        super().__init__(config)
        self.model = config.make_model()
        self._frozen = [name for name, p in self.named_parameters() if not p.requires_grad]
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]
        if self.model.token_emb.weight.device.type != "meta":  # has the weights of a new model
            for module in self.modules():
                mark_as_initialized(module)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load as PreTrainedModel does; parameters that no optimizer is to train stay frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        for name in model._frozen:
            model.get_parameter(name).requires_grad_(False)
        return loaded

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutput | tuple:
        """Logits, or a loss: in training that of the model with all its parts, in eval mode, where
        its exponential is the perplexity, that of the next token alone.

        Args:
            input_ids: (B, N) integers in [0, num_tokens), N <= seq_len (+ 1 with labels).
            attention_mask: (B, N), with zeros at the end of rows only, where they change nothing
                before them. Looking at it costs a synchronisation on a GPU.
            labels: (B, N) as `shtx.HierarchicalTransformer.forward` takes: not shifted, -100 left
                out.
            num_items_in_batch: how many labels count in all micro-batches and processes whose
                losses are added up, as Trainer tells. The next-token loss of all is exact, whatever
                counts they have. The other losses are over counts that nobody tells: each of their
                means has the weight of its micro-batch's labels.
            return_dict: False returns a tuple.

        Returns:
            a CausalLMOutput with logits (B, N, V), N <= seq_len, and with the 0-dim loss if there
            are labels. In training the loss is computed without logits, which are None then.

        Raises:
            TypeError, ValueError: naming the argument, what it got and what is allowed.
        """
        for name, value in kwargs.items():
            if value is not None and value is not False and name != "use_cache":
                raise ValueError(f"{name} must be None: the model has no such input, got {value!r}")
        if attention_mask is not None:
            refuse_gaps(attention_mask, input_ids)
        core, loss, logits = self.model, None, None
        if num_items_in_batch is not None and 0 <= core.ignore_index < core.num_tokens:
            raise ValueError(
                f"ignore_index must be {LEFT_OUT} with num_items_in_batch, as Trainer counts all"
                f" other labels, got {core.ignore_index}: set config.ignore_index before the model"
                " is made, and labels that are to be left out to -100"
            )
        if labels is not None and self.training:
            sums, counts = core(input_ids, labels=labels, loss_reduction="sum")
            means = means_of_columns(core.terms, sums / counts.clamp(min=1))
            loss, count = core.combine(means)[0], counts[0]
        else:
            ids = input_ids
            if labels is not None:
                ids = core.check_ids(ids, return_loss=True, checked=True)[:, : core.seq_len]
            logits = core(ids)
        if labels is not None and not self.training:
            targets = core.check_labels(labels, input_ids)[:, 1:]
            options = dict(ignore_index=core.ignore_index, reduction="sum")
            total, count = cross_entropy(logits[:, : targets.shape[1]], targets, **options)
            loss = total / count.clamp(min=1)
        if loss is not None and num_items_in_batch is not None:
            items = torch.as_tensor(num_items_in_batch, device=loss.device)
            items = items.reshape(-1)[0].clamp(min=1)  # DataParallel has one for each device
            loss = loss * count / items
        output = CausalLMOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        **kwargs,
    ) -> Tensor:
        """Sample by the cached `shtx.generation.generate`, from what a GenerationConfig says.

        Greedy, or sampling with temperature, top_k and top_p; `model.model.generate` has more.

        Args:
            inputs: (B, T) prompts, or input_ids=....
            generation_config: in place of the model's own.
            attention_mask: (B, T) with zeros at the left of prompts that are shorter. None: zeros
                where they begin with pad_token_id, if that is another than eos_token_id.
            streamer: is told the prompts and each token, as transformers does.
            **kwargs: of a GenerationConfig: max_new_tokens, max_length, do_sample, temperature,
                top_k (50 by default, 0: all), top_p, eos_token_id, pad_token_id, use_cache,
                num_return_sequences.

        Returns:
            (B num_return_sequences, T + new) int64 with the prompts, and pad_token_id, or
            eos_token_id if there is none, after eos_token_id.

        Raises:
            TypeError, ValueError: naming what is not supported, such as num_beams, or is wrong.
        """
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if not isinstance(inputs, Tensor) or inputs.ndim != 2:
            raise ValueError(f"input_ids must be (batch, tokens), got {describe(inputs)}")
        told = self._told(generation_config, kwargs)
        eos, pad = single("eos_token_id", told["eos_token_id"]), told["pad_token_id"]
        if attention_mask is None and pad is not None and pad != eos:
            attention_mask = (inputs != pad).cumsum(dim=1) > 0
        copies = told["num_return_sequences"] or 1
        inputs = inputs.repeat_interleave(copies, dim=0)
        prompts = inputs
        if attention_mask is not None:
            prompts = without_padding(inputs, attention_mask.repeat_interleave(copies, dim=0))
        count = told["max_new_tokens"]
        if count is None and (most := told["max_length"]) is not None:
            count = max(0, most - inputs.shape[1])
        options = dict(stop_token=eos, use_cache=told["use_cache"] is not False)
        sampling = dict(temperature=0, top_k=1)
        if told["do_sample"]:
            top_k = TOP_K if told["top_k"] is None else told["top_k"] or self.model.num_tokens
            temperature = 1.0 if told["temperature"] is None else told["temperature"]
            sampling = dict(temperature=temperature, top_k=top_k, top_p=told["top_p"])
        count = NEW_TOKENS if count is None else count
        tokens = self.model.generate(prompts, count, stream=True, **options, **sampling)
        if streamer is not None:
            streamer.put(inputs.cpu())
        new, ended = [], torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        for ids in tokens:
            if pad is not None and eos is not None:
                ids, ended = ids.masked_fill(ended, pad), ended | (ids == eos)
            new.append(ids)
            if streamer is not None:
                streamer.put(ids.cpu())
        if streamer is not None:
            streamer.end()
        return torch.cat((inputs.long(), *(ids[:, None] for ids in new)), dim=1)

    def _told(self, config: GenerationConfig | None, kwargs: dict) -> dict:
        """Read a GenerationConfig and keywords; raise for an option that has no effect here."""
        own = self.generation_config
        config = copy.deepcopy(own if config is None else config)
        others = config.update(**kwargs)
        said = own.to_diff_dict() | config.to_diff_dict() | others
        for name, value in said.items():
            neutral = not value or NEUTRAL.get(name) == value
            if name not in TAKEN and name[0] != "_" and not neutral:
                taken = ", ".join(TAKEN[:-1])
                raise ValueError(f"{name} must be left out, got {value!r}: generate takes {taken}")
        default = lambda name: getattr(own, name, None)
        return {n: default(n) if (v := getattr(config, n, None)) is None else v for n in TAKEN}

    # the interface that transformers asks of a model

    def get_input_embeddings(self):
        return self.model.token_emb

    def get_output_embeddings(self):
        return self.model.to_logits

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError(
            "num_tokens must stay: what levels reconstruct has it in its sizes, too; make a model"
            " of another config"
        )

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ):
        """Set `model.checkpointing`, whatever the kwargs of torch's own function are."""
        for name, value, allowed in (
            ("every_n_layers", every_n_layers, 1),
            ("offload", offload, False),
        ):
            if value != allowed:
                raise ValueError(f"{name} must be {allowed}, got {value}")
        self.model.checkpointing = True

    def gradient_checkpointing_disable(self):
        self.model.checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.model.checkpointing

    @torch.no_grad()
    def _init_weights(self, module):
        """Give what a checkpoint has not kept its initial values; `init` leaves the others."""
        if isinstance(module, version_4.HierarchicalTransformer):
            steps = version_4.normalized(module.rollout_weights, module.num_rollouts)
            init.copy_(module.rollout_loss_weights, steps)
        elif not isinstance(module, (Trunk, PreTrainedModel)):
            draw(module, init.copy_)


def describe(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def single(name: str, value: int | list[int] | None) -> int | None:
    """One token, where transformers would take several."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if len(values) != 1:
        raise ValueError(f"{name} must be one token, got {value}")
    return values[0]


def refuse_gaps(attention_mask: Tensor, input_ids: Tensor) -> None:
    """Raise a ValueError for a mask that hides a token from those after it."""
    check_mask(attention_mask, input_ids)
    mask = attention_mask.bool()
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(
            "attention_mask must have its zeros at the end of rows, where the model, which is"
            " causal, needs none; got zeros before ones, which generate alone takes"
        )


def without_padding(input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """The rows (T,) that a mask leaves of prompts padded at the left."""
    check_mask(attention_mask, input_ids)
    mask = attention_mask.bool()
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()) or not bool(mask[:, -1:].all()):
        raise ValueError(
            "attention_mask must have its zeros at the left of prompts in generate, and a one at"
            " the right, got zeros after ones: tokenizers take padding_side='left'"
        )
    return [
        row[row.shape[0] - int(kept) :] for row, kept in zip(input_ids, mask.sum(1), strict=True)
    ]


def check_mask(attention_mask: Tensor, input_ids: Tensor) -> None:
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {describe(input_ids)}, got"
            f" {describe(attention_mask)}"
        )


AutoConfig.register(HierarchicalConfig.model_type, HierarchicalConfig)
AutoModelForCausalLM.register(HierarchicalConfig, HierarchicalTransformerForCausalLM)
# Trainer's label smoothing shifts the labels of these alone
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[HierarchicalConfig.model_type] = (
    HierarchicalTransformerForCausalLM.__name__
)
