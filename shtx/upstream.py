"""A model of simple-hierarchical-transformer 0.2.0 or 0.4.0 as one of this package, on the same
parameters.

What its constructor was told is read from the model, and a second one is made of that, without
memory. Whatever the model has otherwise than that one is named in an error, so that nothing is lost
unseen.
"""

from torch import Tensor, device, nn
from torch.nn import Module

from shtx import next_latent
from shtx.internals import buffers_of
from shtx.model import HierarchicalTransformer, Trunk
from shtx.plan import HOOKS

PACKAGE = "simple_hierarchical_transformer"
# attributes that scripts set after construction, and that the constructor does not take
SET_LATER = (
    *("recon_loss_weight", "should_recon"),
    *("has_hierarchical_ar_loss", "need_hierarchical_merge"),
)
OF_CACHES = ("cached_freqs_seq_len", "cached_scales_seq_len")
COMPARED = (bool, int, float, str, tuple, type(None))
OWN_LOSSES = {  # losses that 0.4.0 makes itself, by what its constructor calls them
    "MSECosineSimLoss": ("mse_and_cosine_sim", dict(weight=0.9)),
    "MSELoss": ("mse", dict(reduction="none")),
    "SmoothL1Loss": ("smooth_l1", dict(reduction="none", beta=1.0)),
}


def from_upstream(model: Module, impl: str = "auto") -> Trunk:
    """Make a model that takes the place of upstream's.

    It has the parameters of the model, not copies, so that an optimizer of the model goes on with
    it, and the same outputs. Parameters of a level whose next_latent_loss_weight is 0 have no
    gradient, where upstream's have one of zeros.

    Args:
        model: a HierarchicalTransformer of simple-hierarchical-transformer 0.2.0 or 0.4.0, of any
            device and dtype; it stays as it is.
        impl: as of `HierarchicalTransformer`.

    Returns:
        a `shtx.HierarchicalTransformer` or `shtx.next_latent.HierarchicalTransformer`.

    Raises:
        TypeError: for what is no such model, such as a subclass or a wrapper.
        ValueError: naming what of the model was changed after it was made, such as a module that
            was replaced or has hooks.
    """
    name, module = type(model).__name__, type(model).__module__.partition(".")[0]
    if name != "HierarchicalTransformer" or module != PACKAGE:
        raise TypeError(
            "model must be a HierarchicalTransformer of simple-hierarchical-transformer itself, no"
            f" subclass and nothing around it, got {module}'s {name}"
        )
    try:
        if hasattr(model, "to_hierarchical_preds"):
            kind, options = HierarchicalTransformer, _options_of_2(model)
        elif hasattr(model, "latent_dynamics"):
            kind, options = next_latent.HierarchicalTransformer, _options_of_4(model)
        else:
            raise ValueError(
                "model must be of simple-hierarchical-transformer 0.2.0 or 0.4.0, got neither"
                " to_hierarchical_preds nor latent_dynamics"
            )
    except (AttributeError, LookupError) as error:
        raise ValueError(f"model is not as it was made, and cannot be read: {error}") from error
    requires_grad = {p: p.requires_grad for p in model.parameters()}
    with device("meta"):
        twin, ours = type(model)(**options), kind(**_named_loss(options), impl=impl)
    for p, flag in requires_grad.items():  # modules that the model was given
        p.requires_grad_(flag)
    for name in filter(vars(model).__contains__, SET_LATER):
        setattr(twin, name, getattr(model, name))
        setattr(ours, name, getattr(model, name))
    _refuse_changes(model, twin)
    for name, p in model.named_parameters(remove_duplicate=False):
        parent, _, leaf = name.rpartition(".")
        setattr(ours.get_submodule(parent), leaf, p)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, _ in list(ours.named_buffers(remove_duplicate=False)):
        parent, _, leaf = name.rpartition(".")
        buffers_of(ours.get_submodule(parent))[leaf] = buffers[name]
    return ours.train(model.training)


def _options_of_both(model: Module) -> dict:
    """Return the arguments that the constructors of both versions take."""
    blocks = list(model.layers[0]) if len(model.layers) else []
    columns = [_options_of_block(block) for block in blocks]
    has_recon = any(compressor.should_recon for compressor in model.compressors)
    return dict(
        num_tokens=model.token_emb.num_embeddings,
        dim=tuple(model.dims),
        depth=len(model.layers),
        seq_len=model.seq_len,
        hierarchies=tuple(model.hierarchies),
        hierarchical_stride=tuple(model.h_strides),
        hierarchy_merge_all=model.hierarchy_merge_all,
        predict_hierarchy=model.hierarchies[model.predict_hierarchy_index],
        predict_use_all_hierarchy=model.predict_use_all_hierarchy,
        recon_loss_weight=float(has_recon),
        ignore_index=model.ignore_index,
        **{name: tuple(column[name] for column in columns) for name in (columns or [()])[0]},
    )


def _options_of_block(block: Module) -> dict:
    """Return the arguments of a level's block. Without attention, any number of heads will do."""
    attn, (inner, dim) = block.attn, block.ff.net[1].weight.shape
    ff_mult = inner / dim
    if int(dim * ff_mult) != inner:  # rounded down
        ff_mult = (inner + 0.5) / dim
    if attn is None:
        return dict(window_sizes=0, heads=1, dim_head=2, ff_mult=ff_mult)
    dim_head = attn.to_qkv.out_features // (3 * attn.heads)
    window = getattr(attn, "window_size", None)  # full attention has none
    return dict(window_sizes=window, heads=attn.heads, dim_head=dim_head, ff_mult=ff_mult)


def _options_of_2(model: Module) -> dict:
    weight = model.hierarchical_ar_loss_weight
    return dict(**_options_of_both(model), hierarchical_ar_loss_weight=weight)


def _options_of_4(model: Module) -> dict:
    is_default = lambda module: type(module).__module__.partition(".")[0] == PACKAGE
    summarizers = (None if is_default(m) else m for m in model.chunk_summarizers)
    nets = [
        [m for m in dynamics.net if isinstance(m, nn.Linear)] for dynamics in model.latent_dynamics
    ]
    hidden = [linear[0].out_features for linear in nets if len(linear) > 1]
    names = "num_rollouts", "detach_summaries", "dynamic_rollout_loss_weight", "dynamic_loss_decay"
    return dict(
        **_options_of_both(model),
        **{name: getattr(model, name) for name in names},
        next_latent_loss_weight=tuple(model.next_latent_loss_weight),
        next_latent_loss_type=model.next_latent_loss_fn,
        chunk_summarizers=tuple(summarizers),
        dynamics_hidden_dim=None if hidden in ([], list(model.dims)) else hidden[0],
        dynamics_num_layers=len(nets[0]),
        rollout_weights=model.rollout_loss_weights.tolist(),
    )


def _named_loss(options: dict) -> dict:
    """The options, with a loss that 0.4.0 made under the name that its constructor takes."""
    loss = options.get("next_latent_loss_type")
    name, made_with = OWN_LOSSES.get(type(loss).__name__, (None, {}))
    is_own = type(loss).__module__.partition(".")[0] in (PACKAGE, "torch")
    same = all(getattr(loss, key, None) == value for key, value in made_with.items())
    return options | dict(next_latent_loss_type=name) if name and is_own and same else options


def _refuse_changes(model: Module, twin: Module):
    """Raise a ValueError for what a model has otherwise than the one made of its options."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, made in twin.named_modules(remove_duplicate=False):
        at, module = f"model.{name}" if name else "model", modules.pop(name, None)
        if module is made:  # that the model was given
            continue
        if type(module) is not type(made):
            got = "nothing" if module is None else f"a {type(module).__name__}"
            raise ValueError(f"{at} must be the {type(made).__name__} that it was made, got {got}")
        for hooks in filter(vars(module).get, HOOKS):
            raise ValueError(f"{at} must have no hooks, got {hooks[1:].replace('_', ' ')}")
        _refuse_attributes(at, module, made)
    for name, module in modules.items():
        raise ValueError(f"model.{name} must not be there, got a {type(module).__name__}")


def _refuse_attributes(at: str, module: Module, made: Module):
    values, expected = vars(module), vars(made)
    for name in (n for n in values.keys() - expected.keys() if hasattr(type(module), n)):
        raise ValueError(f"{at}.{name} must be that of its class, got one of its own")
    for name, value in expected.items():
        is_compared = isinstance(value, COMPARED) and name[0] != "_" and name not in OF_CACHES
        if is_compared and name != "training" and (got := values.get(name, module)) != value:
            raise ValueError(
                f"{at}.{name} must be {value!r} as in a model of its sizes, got {got!r}"
            )
    for name in made._parameters.keys() | module._parameters.keys():
        shapes = [_shape(m._parameters.get(name)) for m in (made, module)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{at}.{name} must have shape {shapes[0]}, got {shapes[1]}")


def _shape(p: Tensor | None) -> tuple | None:
    return None if p is None else tuple(p.shape)
