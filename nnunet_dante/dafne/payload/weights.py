"""Shipped: weights in and out of the network, and the arithmetic of merging.

Dafne would store the default functions of the exporting version, and those before 2.0.2b0 fail on every version. Each
function is shipped by itself, so its imports are inside, and it has no annotations and no helpers.
"""


def weights_to_model(model, weights):
    """Load weights whose keys and shapes are exactly the network's."""
    own = model.model.state_dict()
    wrong = sorted(set(own) ^ set(weights)) or [k for k in own if own[k].shape != weights[k].shape]
    if wrong:
        raise ValueError(f"These weights are not this network's: {len(wrong)} differ, such as {wrong[0]}.")
    model.model.load_state_dict({k: v.to(own[k].device) for k, v in weights.items()})


def model_to_weights(model):
    """Return a copy of the weights, each once."""
    from collections import OrderedDict

    return OrderedDict((k, v.detach().clone()) for k, v in model.model.state_dict().items())


def weight_copy(weights):
    """Return an independent copy."""
    from collections import OrderedDict

    return OrderedDict((k, v.clone()) for k, v in weights.items())


def calc_delta(model, base, threshold=None):
    """Return `model` - `base` as a delta model that carries the base's timestamp."""
    from dafne_dl.interfaces import IncompatibleModelError

    if model.model_id != base.model_id:
        raise IncompatibleModelError(f"A model {model.model_id} has no difference to another, {base.model_id}.")
    new, old = model.get_weights(), base.get_weights()
    for key, value in new.items():
        value -= old[key].to(value.device)
        if threshold is not None:
            value[value.abs() < threshold] = 0
    result = model.get_empty_copy()
    result.set_weights(new)
    result.is_delta, result.timestamp_id = True, base.timestamp_id
    return result


def add(model, other):
    """Return `model` + `other`, weight by weight; counters (whole numbers) stay `model`'s."""
    from dafne_dl.interfaces import IncompatibleModelError

    if model.model_id != other.model_id:
        raise IncompatibleModelError(f"A model {model.model_id} cannot be merged with another, {other.model_id}.")
    total, more = model.get_weights(), other.get_weights()
    for key, value in total.items():
        if value.is_floating_point():
            value += more[key].to(value.device)
    result = model.get_empty_copy()
    result.set_weights(total)
    result.is_delta = model.is_delta and other.is_delta
    return result


def multiply(model, factor):
    """Return `model` with every weight times `factor`, which is an int or a float."""
    if not isinstance(factor, (int, float)):
        raise NotImplementedError(f"A model can be multiplied by an int or a float, not by {type(factor).__name__}.")
    weights = model.get_weights()
    for value in weights.values():
        if value.is_floating_point():
            value *= factor
    result = model.get_empty_copy()
    result.set_weights(weights)
    return result
