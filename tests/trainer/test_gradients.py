"""Per-sample gradients: against plain backward passes, and the two-sided estimator against enumeration."""

import numpy as np
import pytest
import torch
from tabular import SEQUENCES, Tabular, log_weights
from transformers import ProcessorMixin
from worlds import VERIFIER, world

from npo_core.trainer import gradients
from npo_core.trainer.gradients import SourceGradients, both_sided, own_gram, selected_parameters, source_gradients
from npo_core.trainer.inputs import encode_prompts
from npo_core.trainer.sampling import sample_rollouts


@pytest.fixture(scope="module", params=["text", "pictures", "words"])
def scene(request):
    """A world, its policy, rows with one response each (of different lengths), and log-probs of some source."""
    tiny = world(request.param)
    model, rows = tiny.build().eval(), list(tiny.dataset.select(range(3)))
    with torch.no_grad():  # at initialisation every token is as likely, and a wrong weight would not show
        model.get_input_embeddings().weight.mul_(4)
    groups = sample_rollouts(model, tiny.processor, rows, 1, VERIFIER, seed=3, max_new_tokens=6)
    completions = [group[0].token_ids[: 4 + place] for place, group in enumerate(groups)]
    assert len({len(tokens) for tokens in completions}) > 1
    rng = np.random.default_rng(0)
    behaviour = [(-1.0 - 3.0 * rng.random(len(tokens))).tolist() for tokens in completions]
    return tiny.processor, model, rows, completions, behaviour


def logps_of(scene, place):
    """ln π of the tokens of one response, by one forward pass of everything, differentiable."""
    processor, model, rows, completions, _ = scene
    inputs = encode_prompts(processor, [rows[place]])
    prompt, tokens = inputs["input_ids"].shape[1], torch.tensor([list(completions[place])])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tokens)], dim=1)
    logits = model(**inputs).logits[0, prompt - 1 : -1]
    if isinstance(processor, ProcessorMixin):  # never sampled, and so not scored
        logits = logits.index_fill(-1, torch.tensor([processor.image_token_id]), -torch.inf)
    return logits.log_softmax(-1).gather(-1, tokens[0].unsqueeze(-1))[:, 0]


def backward(scene, place, weights):
    """Gradient of the weighted mean of ln π(y_t) by `backward`, flat, as a new array."""
    model = scene[1]
    model.zero_grad()
    (logps_of(scene, place) * torch.as_tensor(weights, dtype=torch.float32)).mean().backward()
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return torch.cat([part.flatten() for part in flat]).numpy()


def arguments(scene):
    processor, model, *others = scene
    return model, processor, *others


@pytest.fixture(scope="module")
def found(scene):
    return source_gradients(*arguments(scene))


@pytest.fixture(scope="module")
def grams(scene):
    return own_gram(scene[1], scene[0], scene[2], scene[3])


def test_the_plain_gradient_is_that_of_the_mean_log_prob(scene, found):
    for place, tokens in enumerate(scene[3]):
        expected = backward(scene, place, np.ones(len(tokens)))
        np.testing.assert_allclose(found.plain[place], expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    assert found.plain.dtype == np.float32
    assert np.linalg.norm(found.plain, axis=1).min() > 0.1
    # gradients of different responses differ, so a mixed-up row would show
    assert np.linalg.norm(found.plain[0] - found.plain[1]) > 0.1


def test_the_exact_norm_and_the_log_weight_are_those_of_weights_held_constant(scene, found):
    for place, behaviour in enumerate(scene[4]):
        log_weight = logps_of(scene, place).detach().numpy() - behaviour
        assert np.abs(log_weight).max() > 0.3
        weighted = backward(scene, place, np.exp(log_weight)).astype(float)
        assert found.exact[place] == pytest.approx(np.square(weighted).sum(), rel=1e-3)
        assert found.log_weight[place] == pytest.approx(log_weight.sum(), abs=1e-4)
        assert found.exact[place] != pytest.approx(np.square(found.plain[place]).sum(), rel=0.05)


def test_trajectories_that_share_a_forward_pass_do_not_touch_each_other(scene, found, monkeypatch):
    for chunk in (1, 2):  # each on its own, and a last one that does not fill a pass
        monkeypatch.setattr(gradients, "CHUNK", chunk)
        again = source_gradients(*arguments(scene))
        np.testing.assert_allclose(again.plain, found.plain, rtol=1e-3, atol=1e-5 * np.abs(found.plain).max())
        assert again.exact == pytest.approx(found.exact, rel=1e-3)
        assert again.log_weight == pytest.approx(found.log_weight, abs=1e-4)


def test_token_weights_are_cut(scene):
    processor, model, rows, completions, _ = scene
    far = [[-100.0] * len(tokens) for tokens in completions]
    found = source_gradients(model, processor, rows, completions, far)
    whole = [
        logps_of(scene, place).detach().sum().item() + 100 * len(tokens) for place, tokens in enumerate(completions)
    ]
    plain = np.square(found.plain.astype(float)).sum(axis=1)
    assert found.exact == pytest.approx(plain * np.exp(2 * gradients.LOG_CAP), rel=1e-3)
    assert found.log_weight == pytest.approx(whole, abs=1e-2), "W is cut where it is used"
    assert min(whole) > 2 * gradients.LOG_CAP


def test_the_gram_matrix_gives_the_norm_for_any_weights(scene, grams):
    rng = np.random.default_rng(1)
    for place, gram in enumerate(grams):
        length = len(scene[3][place])
        assert gram.shape == (length, length)
        assert gram == pytest.approx(gram.T)
        for weights in (np.ones(length), rng.normal(size=length), np.eye(length)[-1], np.exp(rng.normal(size=length))):
            norm = np.square(backward(scene, place, weights).astype(float)).sum()
            assert weights @ gram @ weights / length**2 == pytest.approx(norm, rel=1e-3)


def test_where_source_and_policy_are_one_both_sides_give_the_on_policy_value(scene, grams):
    processor, model, rows, completions, _ = scene
    same = [logps_of(scene, place).detach().tolist() for place in range(len(rows))]
    found = source_gradients(model, processor, rows, completions, same)
    terms = both_sided(found, grams, [np.zeros(len(tokens)) for tokens in completions])
    assert terms["own"] == pytest.approx(np.square(found.plain.astype(float)).sum(axis=1), rel=1e-3)
    assert terms["exact"] == pytest.approx(terms["own"], rel=1e-3)
    assert terms["sequence"] == pytest.approx(terms["own"], rel=1e-3)


def test_names_select_parameters(scene, found):
    processor, model, rows, completions, behaviour = scene
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    starts = np.cumsum([0, *sizes])
    chosen = [i for i, name in enumerate(names) if name.endswith("self_attn.q_proj.weight")]
    assert 0 < len(chosen) < len(names)
    narrow = source_gradients(model, processor, rows, completions, behaviour, r"self_attn\.q_proj\.weight$")
    expected = np.concatenate([found.plain[:, starts[i] : starts[i] + sizes[i]] for i in chosen], axis=1)
    np.testing.assert_allclose(narrow.plain, expected, rtol=1e-5, atol=1e-7)
    assert (narrow.exact < found.exact).all()
    gram = own_gram(model, processor, rows[:1], completions[:1], r"self_attn\.q_proj\.weight$")[0]
    assert gram.sum() / len(gram) ** 2 == pytest.approx(np.square(expected[0].astype(float)).sum(), rel=1e-3)


def test_frozen_parameters_are_left_out_and_unknown_names_refused(scene):
    processor, model, rows, completions, _ = scene
    frozen = model.get_input_embeddings().weight
    frozen.requires_grad_(False)
    try:
        chosen = selected_parameters(model)
        assert len(chosen) == len(list(model.parameters())) - 1
        assert all(parameter is not frozen for parameter in chosen)
        with pytest.raises(ValueError, match="No trainable parameter matches 'embed_tokens'"):
            selected_parameters(model, "embed_tokens")
    finally:
        frozen.requires_grad_(True)
    unknown = r"No trainable parameter matches 'layers\.77'; there are \d+, such as"
    with pytest.raises(ValueError, match=unknown):
        source_gradients(*arguments(scene), "layers.77")
    with pytest.raises(ValueError, match=unknown):
        own_gram(model, processor, rows, completions, "layers.77")


def test_an_empty_response_is_refused(scene):
    processor, model, rows, completions, behaviour = scene
    with pytest.raises(ValueError, match="empty response"):
        source_gradients(model, processor, rows, [*completions[:2], ()], [*behaviour[:2], ()])
    with pytest.raises(ValueError, match="empty response"):
        own_gram(model, processor, rows, [*completions[:2], ()])


def test_what_does_not_fit_in_memory_is_refused_before_it_is_computed(scene, monkeypatch):
    processor, model, rows, completions, behaviour = scene
    size = sum(p.numel() for p in selected_parameters(model, "norm"))
    monkeypatch.setattr(gradients, "device_memory", lambda device: int(4 * size * 2 / gradients.SHARE))
    assert len(source_gradients(model, processor, rows[:2], completions[:2], behaviour[:2], "norm").plain) == 2
    monkeypatch.setattr(gradients, "forced_logps", lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match=rf"3 gradients over {size:,} parameters take .* GiB.*Select fewer parameters"):
        source_gradients(*arguments(scene), "norm")
    # the policy's own trajectories need a gradient per token, and long responses have many
    with pytest.raises(ValueError, match=rf"over {size:,} parameters take .* GiB.*Select fewer parameters"):
        own_gram(model, processor, rows, completions, "norm")


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_and_the_accumulated_gradients_stay(scene, training):
    processor, model, rows, completions, behaviour = scene
    parameters = list(model.parameters())
    model.train(training)
    parameters[0].grad = torch.full_like(parameters[0], 0.5)
    try:
        with torch.no_grad():  # and gradients are computed where the caller has switched them off
            found = source_gradients(model, processor, rows[:1], completions[:1], behaviour[:1])
            own_gram(model, processor, rows[:1], completions[:1])
        assert np.linalg.norm(found.plain) > 0
        assert model.training is training
        assert bool((parameters[0].grad == 0.5).all())
        assert all(parameter.grad is None for parameter in parameters[1:])
    finally:
        model.zero_grad()
        model.eval()


# Both sides, on policies that can be enumerated: a mild pair, and one where q has all but left what π does


def nearly_left():
    """A uniform policy, and a source that writes one response nearly always."""
    return Tabular([0.0, 0.0, 0.0], np.zeros((2, 3))), Tabular([0.0, 9.0, 0.0], [[0.0, 8.0, 0.0], [0.0, 0.0, 0.0]])


PAIRS = {"mild": (Tabular.drawn(0), Tabular.drawn(5)), "far": nearly_left()}


def enumerated(policy, source):
    """Of all of `SEQUENCES`: π, q, ln w of each token, ‖g‖² and ‖G‖², by hand."""
    ln_w = [log_weights(policy, source, y) for y in SEQUENCES]
    plain = np.array([np.square(policy.gradient(y)).sum() for y in SEQUENCES])
    exact = [np.square(policy.gradient(y, np.exp(w))).sum() for y, w in zip(SEQUENCES, ln_w, strict=True)]
    return policy.probabilities(), source.probabilities(), ln_w, plain, np.array(exact)


def exact_moments(policy, source):
    """E_π‖g‖², E_q‖G‖² and E_q[W²‖g‖²]."""
    p, q, _, plain, exact = enumerated(policy, source)
    return {"own": p @ plain, "exact": q @ exact, "sequence": q @ ((p / q) ** 2 * plain)}


def estimator(policy, source):
    """`both_sided` of responses y ~ q and y ~ π, given as places in `SEQUENCES`."""
    _, _, ln_w, _, exact = enumerated(policy, source)
    plain = np.array([policy.gradient(y) for y in SEQUENCES])
    log_weight = np.array([values.sum() for values in ln_w])
    grams = [policy.token_gradients(y) @ policy.token_gradients(y).T for y in SEQUENCES]

    def terms(of_source, of_own):
        places = list(of_source)
        found = SourceGradients(plain[places], exact[places], log_weight[places])
        return both_sided(found, [grams[place] for place in of_own], [ln_w[place] for place in of_own])

    return terms


@pytest.mark.parametrize("pair", PAIRS)
def test_the_expectation_over_all_samples_of_both_policies_is_the_second_moment(pair):
    policy, source = PAIRS[pair]
    every = [(i, j) for i in range(len(SEQUENCES)) for j in range(len(SEQUENCES))]
    chance = np.array([source.probabilities()[i] * policy.probabilities()[j] for i, j in every])
    terms = estimator(policy, source)(*zip(*every, strict=True))
    found = {name: float(chance @ values) for name, values in terms.items()}
    exact = exact_moments(policy, source)
    assert found == pytest.approx(exact)
    numbers = sorted(exact.values())
    assert min(numbers[1] / numbers[0], numbers[2] / numbers[1]) > 1.05  # none could stand for another


@pytest.mark.parametrize("name", ["exact", "sequence"])
def test_where_the_source_has_left_its_own_samples_read_far_too_low_and_both_sides_do_not(name):
    policy, source = PAIRS["far"]
    truth, terms, rng = exact_moments(policy, source)[name], estimator(policy, source), np.random.default_rng(0)
    p, q, _, plain, exact = enumerated(policy, source)
    of_source, of_own = (rng.choice(len(SEQUENCES), (100, 200), p=chances) for chances in (q, p))
    both = np.array([terms(*places)[name].mean() for places in zip(of_source, of_own, strict=True)]) / truth
    alone = (exact if name == "exact" else (p / q) ** 2 * plain)[of_source].mean(axis=1) / truth
    assert np.median(alone) < 0.1
    assert np.median(both) == pytest.approx(1.0, abs=0.1)
    error, error_alone = (np.sqrt(np.mean((values - 1) ** 2)) for values in (both, alone))
    assert error < 0.1 * error_alone
