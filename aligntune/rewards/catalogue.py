"""The rewards that have a name. Importing this loads no reward and nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Registered:
    """A reward that has a name."""

    target: str  # "module:function"
    description: str  # one line
    range: str  # of its scores
    column: str | None = None  # the data column it reads unless its option `column` names another
    reads: tuple[str, ...] = ()  # data columns that it reads under these names alone
    library: str | None = None  # a module that is installed with the extra `rewards` alone
    package: str = ""  # which brings it
    remote: bool = False  # it asks another machine, which may cost: it is not tried before a run
    answer: str | None = None  # "module:function" that reads the answer out of a completion
    thoughts: bool = False  # `<think>` counts, also where the prompt ends with it


PAIR = ("chosen", "rejected")
DEFAULT_FOR_PAIRS = "preference"
"""What a group algorithm is rewarded by where the data are preferences and no reward is named."""

_HERE = "aligntune.rewards."

REWARDS: dict[str, Registered] = {
    "math": Registered(
        _HERE + "math:math_equal",
        "1 if the final answer equals column 'answer' mathematically (math-verify), else 0",
        "0 or 1",
        "answer",
        answer=_HERE + "math:answer_of",
        thoughts=True,
    ),
    "exact_match": Registered(
        _HERE + "text:exact_match",
        "1 if the completion equals column 'answer', else 0",
        "0 or 1",
        "answer",
    ),
    "contains": Registered(
        _HERE + "text:contains",
        "1 if column 'answer' is in the completion, else 0",
        "0 or 1",
        "answer",
    ),
    "code": Registered(
        _HERE + "code:code_passes",
        "1 if the completion's Python passes the tests of column 'tests' in a sandbox, else 0",
        "0 or 1",
        "tests",
    ),
    "format": Registered(
        _HERE + "format:format_match",
        "1 if the completion matches option 'pattern', a regular expression, else 0",
        "0 or 1",
    ),
    "tags": Registered(
        _HERE + "format:tags",
        "1 if it is the parts of option 'tags', such as [think, answer], and nothing else",
        "0 or 1",
        thoughts=True,
    ),
    "json": Registered(
        _HERE + "json_form:json_valid",
        "1 if it is JSON that meets option 'schema' or a column's, else 0 (jsonschema)",
        "0 or 1",
    ),
    "required": Registered(
        _HERE + "phrases:required",
        "the share of option 'phrases', or of a column's, that it has",
        "0 to 1",
    ),
    "forbidden": Registered(
        _HERE + "phrases:forbidden",
        "minus the share of option 'phrases', or of a column's, that it has",
        "-1 to 0",
    ),
    "length": Registered(
        _HERE + "length:length_penalty",
        "0 at option 'target' characters or words, falling to -1 with the distance from it",
        "-1 to 0",
    ),
    "repetition": Registered(
        _HERE + "ngrams:repetition",
        "minus the share of its n-grams that repeat an earlier one",
        "-1 to 0",
    ),
    "diversity": Registered(
        _HERE + "ngrams:diversity",
        "the share of its n-grams that no other completion of the group has",
        "0 to 1",
    ),
    "readability": Registered(
        _HERE + "readability:readability",
        "1 if a readability index is from option 'low' to 'high', falling to 0 (textstat)",
        "0 to 1",
        library="textstat",
        package="textstat",
    ),
    "language": Registered(
        _HERE + "language:language",
        "the probability that it is in option 'language', such as en (py3langid)",
        "0 to 1",
        library="py3langid",
        package="py3langid",
    ),
    "bleu": Registered(
        _HERE + "overlap:bleu",
        "sentence BLEU against column 'answer' (sacrebleu)",
        "0 to 1",
        "answer",
    ),
    "chrf": Registered(
        _HERE + "overlap:chrf",
        "chrF, by characters, against column 'answer' (sacrebleu)",
        "0 to 1",
        "answer",
    ),
    "rouge": Registered(
        _HERE + "overlap:rouge",
        "ROUGE-L, 1 or 2 against column 'answer' (rouge-score)",
        "0 to 1",
        "answer",
        library="rouge_score",
        package="rouge-score",
    ),
    "token_f1": Registered(
        _HERE + "overlap:token_f1",
        "F1 of words against column 'answer', as SQuAD has it",
        "0 to 1",
        "answer",
    ),
    "embedding": Registered(
        _HERE + "meaning:embedding",
        "nearness to column 'answer' by embeddings of option 'model', an encoder (cosine)",
        "0 to 1",
        "answer",
    ),
    "bertscore": Registered(
        _HERE + "meaning:bertscore",
        "BERTScore against column 'answer' by option 'model', an encoder",
        "-1 to 1",
        "answer",
    ),
    "judge": Registered(
        _HERE + "judge:judge",
        "what a language model says of it by option 'rubric', over an OpenAI-compatible server",
        "0 to 1",
        remote=True,
    ),
    DEFAULT_FOR_PAIRS: Registered(
        _HERE + "preference:preference",
        "how much nearer to column 'chosen' than to 'rejected', by characters (chrF)",
        "-1 to 1",
        reads=PAIR,
        thoughts=True,
    ),
    "preference_overlap": Registered(
        _HERE + "preference:preference_overlap",
        "the same by words (F1)",
        "-1 to 1",
        reads=PAIR,
        thoughts=True,
    ),
    "preference_embedding": Registered(
        _HERE + "preference:preference_embedding",
        "the same by embeddings of option 'model', an encoder (cosine)",
        "-1 to 1",
        reads=PAIR,
        thoughts=True,
    ),
}
