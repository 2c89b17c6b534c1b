"""Label scores against brute force, and the counting of answers on models of known behaviour."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jlora import evaluate
from jlora.data import chat
from jlora.data.records import Record
from jlora.errors import JloraError
from jlora.models.transformer import CausalLM, ModelConfig

END = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m.role[0] }}:{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>a:{% endif %}"
)


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def byte_tokenizer(template=TEMPLATE, merges=()):
    """A token a byte, and what `merges` join."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return chat.ChatTokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            eos_token=END,
            additional_special_tokens=["<|turn|>"],
            chat_template=template,
        )
    )


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def tiny(*, scan_layers: bool = False) -> CausalLM:
    config = ModelConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        inv_freq=(1.0, 0.3, 0.1, 0.03),
        tie_word_embeddings=False,
    )
    # Filled by NumPy: the initialisers would take longer to compile than all else here to run.
    abstract = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0), scan_layers=scan_layers))
    random = np.random.default_rng(0)
    graphdef, state = nnx.split(abstract)
    filled = jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), x.dtype), state)
    return nnx.merge(graphdef, filled)


def follows(tokenizer, **next_of) -> CausalLM:
    """A model that writes, after each character, the one given; "end" stands for the stop token.

    Its layers add nothing, each of these characters is embedded along an axis of its own, and the
    output projection leads from that axis to the next one.
    """
    model = tiny()
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.kernel.set_value(jnp.zeros_like(linear.kernel[...]))
    embedding, kernel = np.zeros((260, 32), np.float32), np.zeros((32, 260), np.float32)
    names = {"start": ":", "end": END, "space": "Ġ"}
    for axis, (one, other) in enumerate(next_of.items()):
        embedding[tokenizer.convert_tokens_to_ids(names.get(one, one)), axis] = 1
        kernel[axis, tokenizer.convert_tokens_to_ids(names.get(other, other))] = 1
    model.model.embed_tokens.embedding.set_value(jnp.asarray(embedding))
    model.model.norm.weight.set_value(jnp.ones(32))
    model.lm_head.kernel.set_value(jnp.asarray(kernel))
    return model


def record(question: str, answer: str, where: str = "test.jsonl:1") -> Record:
    system = {"role": "system", "content": "Choose."}
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Record([system, *turns], where)


@nnx.jit
def _log_probs(model, tokens):
    return jax.nn.log_softmax(model(tokens), axis=-1)


def brute_force(model, asked: Record, label: str, tokenizer, *, end: bool) -> float:
    """The label's log-probability from a pass over the whole conversation, without a cache."""
    prompt = chat.prompt_tokens(asked, tokenizer).tolist()
    ids = tokenizer(label + (END if end else ""), add_special_tokens=False)["input_ids"]
    tokens = np.zeros((1, 96), np.int32)
    tokens[0, : len(prompt) + len(ids)] = prompt + ids
    log_probs = np.asarray(_log_probs(model, tokens))[0]
    return sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(ids))


PLAIN = ["no", "yes", "nay", "x"]
PREFIXES = ["ab", "a", "abc", "b"]
# Several groups of nodes, and one label that is longer than a group is wide by default.
MANY = ["".join(letters) for letters in itertools.product("xyz", "uvw", "ab", "cde")] + ["a" * 25]


@pytest.mark.parametrize(
    ("labels", "end", "scan_layers"),
    [(PLAIN, False, False), (PREFIXES, True, True), (MANY, False, False)],
    ids=["plain", "prefixes", "many"],
)
def test_label_scores_equal_brute_force(tokenizer, monkeypatch, labels, end, scan_layers):
    model = tiny(scan_layers=scan_layers)
    questions = ["why not", "so", "is it really so", "hm", "?"]
    records = [record(q, labels[i % len(labels)]) for i, q in enumerate(questions)]
    expected = np.array(
        [[brute_force(model, r, label, tokenizer, end=end) for label in labels] for r in records]
    )
    seen = []
    score = evaluate._score
    monkeypatch.setattr(evaluate, "_score", lambda *args: seen.append(score(*args)) or seen[-1])
    report = evaluate.answers(
        model,
        tokenizer,
        records,
        labels=labels,
        stop_ids=[tokenizer.eos_token_id],
        batch_size=5,
    )
    by_length = np.argsort([len(q) for q in questions], kind="stable")
    np.testing.assert_allclose(seen[0], expected[by_length], rtol=1e-5)
    right = [i % len(labels) == best for i, best in enumerate(expected.argmax(axis=1))]
    assert report.label == np.mean(right)


def test_one_token_labels_need_no_pass_of_their_own(tokenizer):
    spelled = [(7, 2), (9, 2)]
    assert evaluate._tree(spelled, ["y", "n"]).tokens.shape[0] == 0


def test_labels_that_begin_alike_share_their_tokens():
    tree = evaluate._tree([(1, 2, 3, 0), (1, 2, 4, 0), (5, 0)], ["a", "b", "c"])
    assert tree.tokens.tolist() == [[1, 2]]
    assert tree.depths.tolist() == [[0, 1]]
    assert tree.above.tolist() == [[[True, False], [True, True]]]


RECORDS = [record("one", "ye"), record("two two", "no"), record("3", " ye\n")]


def answers(tokenizer, model, labels=("no", "ye")) -> evaluate.AnswerReport:
    stops = [tokenizer.eos_token_id]
    return evaluate.answers(model, tokenizer, RECORDS, labels=labels, stop_ids=stops, batch_size=2)


def test_counts_exact_answers_and_likeliest_labels(tokenizer):
    model = follows(tokenizer, start="y", y="e", e="end")
    report = answers(tokenizer, model)
    assert report == evaluate.AnswerReport(3, 2 / 3, 2 / 3, ["ye"] * 3)
    free = answers(tokenizer, model, labels=None)
    assert free == evaluate.AnswerReport(3, 2 / 3, None, ["ye"] * 3)


def test_an_answer_that_goes_on_is_not_exact(tokenizer):
    # No stop after the space: stripped, what was written equals the reference.
    report = answers(tokenizer, follows(tokenizer, start="y", y="e", e="space"))
    assert report == evaluate.AnswerReport(3, 0.0, 2 / 3, ["ye"] * 3)


def test_a_second_model_compiles_nothing(tokenizer, monkeypatch):
    answers(tokenizer, follows(tokenizer, start="y", y="e", e="end"))

    def fail(*args):
        raise AssertionError("traced again")

    monkeypatch.setattr(CausalLM, "extend", fail)
    monkeypatch.setattr(CausalLM, "logits", fail)
    report = answers(tokenizer, follows(tokenizer, start="n", n="o", o="end"))
    assert report == evaluate.AnswerReport(3, 1 / 3, 1 / 3, ["no"] * 3)


def test_an_answer_is_spelled_in_place_of_the_last_turn(tokenizer):
    turns = [("user", "q"), ("assistant", "n"), ("user", "r"), ("assistant", "yes")]
    asked = Record([{"role": role, "content": text} for role, text in turns], "test.jsonl:1")
    prompt = chat.prompt_tokens(asked, tokenizer)
    stop = tokenizer.eos_token_id
    spelled = evaluate._spell(evaluate._answered(asked, content="no"), prompt, tokenizer, [stop])
    assert spelled == (*tokenizer.convert_tokens_to_ids(["n", "o"]), stop)


THINKS = TEMPLATE.replace(
    "{{ m.content }}",
    "{% if loop.last and m.role == 'assistant' %}+-{% endif %}{{ m.content }}",
)


def test_an_answer_is_compared_as_the_template_writes_it():
    # As Qwen3's puts an empty thought before an answer, which the model learns to write.
    thinks = byte_tokenizer(THINKS)
    report = evaluate.answers(
        follows(thinks, **{"start": "+", "+": "-", "-": "y", "y": "e", "e": "end"}),
        thinks, RECORDS, labels=["no", "ye"], stop_ids=[thinks.eos_token_id], batch_size=2,
    )  # fmt: skip
    assert report == evaluate.AnswerReport(3, 2 / 3, 2 / 3, ["+-ye"] * 3)


def test_the_last_answer_that_is_trained_is_the_reference(tokenizer):
    turns = [("user", "q"), ("assistant", "ye"), ("user", "r"), ("assistant", "no")]
    messages = [{"role": role, "content": text} for role, text in turns]
    asked = [Record(messages, "test.jsonl:1", context=frozenset([3]))]
    model = follows(tokenizer, start="y", y="e", e="end")
    stops = [tokenizer.eos_token_id]
    assert evaluate.answers(model, tokenizer, asked, labels=None, stop_ids=stops).exact == 1.0


def test_references_that_are_no_label(tokenizer):
    records = [record("q", f"odd {i}", f"test.jsonl:{i + 1}") for i in range(12)]
    with pytest.raises(JloraError) as caught:
        evaluate.answers(tiny(), tokenizer, records, labels=["yes", "no"], stop_ids=[256])
    message = str(caught.value)
    assert "12 of 12 answers are not among the 2 labels" in message
    assert "test.jsonl:10: 'odd 9'" in message
    assert "and 2 more" in message
    assert "'yes', 'no'" in message


@pytest.mark.parametrize(
    ("labels", "stops", "message"),
    [
        ([], [256], "there are no labels"),
        (["yes", "yes "], [256], "'yes' is there twice"),
        (["yes"], [3], "none of stop_ids = \\[3\\] is there"),
    ],
)
def test_labels_and_stops_that_cannot_be_used(tokenizer, labels, stops, message):
    with pytest.raises(JloraError, match=message):
        evaluate.answers(tiny(), tokenizer, [record("q", "yes")], labels=labels, stop_ids=stops)


def test_no_records(tokenizer):
    with pytest.raises(JloraError, match="0 records"):
        evaluate.answers(tiny(), tokenizer, [], labels=None, stop_ids=[256])


def test_a_tokenizer_that_would_join_answer_and_prompt():
    # ":y" is one token of the whole text; the model is given ":" and goes on.
    joining = byte_tokenizer(merges=[(":", "y")])
    asked = record("q", "yes")
    prompt = chat.prompt_tokens(asked, joining)
    spelled = evaluate._spell(asked, prompt, joining, [joining.eos_token_id])
    assert joining.decode(spelled) == "yes" + END
    assert joining.convert_tokens_to_ids(":y") not in spelled


def test_labels_that_a_template_makes_the_same():
    trims = byte_tokenizer(TEMPLATE.replace("m.content", "m.content.replace(' ', '')"))
    with pytest.raises(JloraError, match="'ye s' and 'yes' are the same tokens"):
        evaluate.answers(
            tiny(),
            trims,
            [record("q", "yes")],
            labels=["ye s", "no", "yes"],
            stop_ids=[trims.eos_token_id],
        )
