"""A run as a model of lm-eval: its numbers are the model's own log-probabilities."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_runs import save_tiny_run, tiny_config

from msa_jax.config import ConfigError

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402

from msa_jax.interop.language_model_evaluation import RunLM  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "run"
    save_tiny_run(folder, tiny_config("*.txt"))
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return RunLM(folder, batch_tokens=128)


@pytest.fixture(scope="module")
def log_probs(model):
    """Log-probabilities [n, V] of what follows each token of a text, the separator first."""
    forward = jax.jit(lambda m, t: jax.nn.log_softmax(m(t).logits))

    def log_probs(ids):
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(forward(model.model, padded))[0, : len(ids)]

    return log_probs


def ids_of(text):
    return [255, *text.encode()]


def ask(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=argument, idx=index)
        for index, argument in enumerate(arguments)
    ]


def test_continuations_are_scored_by_the_model(model, log_probs):
    pairs = [("the cat", " sat"), ("", "dog"), ("a b ", "c"), ("x" * 40, "y" * 20)]
    found = model.loglikelihood(ask("loglikelihood", *pairs))
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        ids = ids_of(context + continuation)
        count = len(ids) - len(ids_of(context.rstrip(" ")))
        expected = log_probs(ids[:-1])[-count:]
        targets = np.array(ids[-count:])
        np.testing.assert_allclose(value, expected[np.arange(count), targets].sum(), rtol=1e-4)
        assert greedy == (expected.argmax(-1) == targets).all()
    likeliest = chr(int(log_probs(ids_of("the cat"))[-1].argmax()))
    assert ord(likeliest) < 128
    assert model.loglikelihood(ask("loglikelihood", ("the cat", likeliest)))[0][1]


def test_a_long_context_loses_its_beginning(model, log_probs):
    context, continuation = "abcdefgh" * 20, "xyz"
    ((value, _),) = model.loglikelihood(ask("loglikelihood", (context, continuation)))
    ids = ids_of(context + continuation)[-LENGTH - 1 :]
    expected = log_probs(ids[:-1])[-3:]
    np.testing.assert_allclose(value, expected[np.arange(3), ids[-3:]].sum(), rtol=1e-4)
    with pytest.raises(ConfigError, match="max_length=64: a continuation has 65 tokens"):
        model.loglikelihood(ask("loglikelihood", ("a", "b" * 65)))


def test_a_document_is_scored_in_windows_each_token_once(model, log_probs):
    text = "".join(chr(97 + index % 26) for index in range(150))
    short, value = model.loglikelihood_rolling(ask("loglikelihood_rolling", (text[:10],), (text,)))
    ids = ids_of(text)
    # The last window sees as much as it can, and scores what is left.
    expected = 0.0
    for start, stop, scored in [(0, 64, 64), (64, 128, 64), (86, 150, 22)]:
        targets = ids[stop - scored + 1 : stop + 1]
        expected += log_probs(ids[start:stop])[-scored:][np.arange(scored), targets].sum()
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    first = log_probs(ids[:10])[np.arange(10), ids[1:11]].sum()
    np.testing.assert_allclose(short, first, rtol=1e-4)


def test_generation_is_greedy_and_stops(model, log_probs):
    ids = ids_of("def f")
    for _ in range(8):
        ids.append(int(log_probs(ids)[-1].argmax()))
    expected = model.run_tokenizer.decode(np.array(ids[6:]))
    (text,) = model.generate_until(ask("generate_until", ("def f", {"max_gen_toks": 8})))
    assert text == expected
    stop = expected[3]
    options = {"until": ["\x00\x00", stop], "max_gen_toks": 8, "do_sample": False}
    (text,) = model.generate_until(ask("generate_until", ("def f", options)))
    assert text == expected[: expected.index(stop)]


@pytest.mark.parametrize(
    ("options", "line"),
    [({"temperature": 1.0}, "only greedy"), ({"max_gen_toks": 64}, "leaves no context")],
)
def test_what_cannot_be_generated_is_refused(model, options, line):
    with pytest.raises(ValueError, match=line):
        model.generate_until(ask("generate_until", ("a", options)))


def test_settings_that_cannot_work_are_refused(folder):
    with pytest.raises(ConfigError, match="max_length=0: must be >= 1"):
        RunLM(folder, max_length=0)


def test_lm_evals_own_evaluator_runs_it(model, log_probs):
    """A task of two questions made here: accuracy is what the log-probabilities say."""
    datasets = pytest.importorskip("datasets")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    docs = [{"question": "to be or not to", "choices": [" be", " go"], "label": 0}] * 2
    docs[1] = {"question": "one two", "choices": [" six", " tea"], "label": 1}

    def dataset(**_):
        return {"test": datasets.Dataset.from_list(docs)}

    task = ConfigurableTask(
        config={
            "task": "local",
            "custom_dataset": dataset,
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "target_delimiter": "",
        }
    )
    results = evaluate(model, {"local": task}, bootstrap_iters=0)
    right = []
    for doc in docs:
        sums = []
        for choice in doc["choices"]:
            ids = ids_of(doc["question"] + choice)
            n = len(choice)
            sums.append(log_probs(ids[:-1])[-n:][np.arange(n), ids[-n:]].sum())
        right.append(int(np.argmax(sums)) == doc["label"])
    assert results["results"]["local"]["acc,none"] == np.mean(right)


def test_without_the_extra_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "import msa_jax.interop\n"
        "try: import msa_jax.interop.language_model_evaluation\n"
        "except ImportError as error: print(error)"
    )
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 'needs lm-eval: pip install "msa-jax[eval]"' in shown
