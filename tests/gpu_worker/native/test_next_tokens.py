from __future__ import annotations

import torch

from gpu_worker.front.grammar.state import GrammarState, only_id
from gpu_worker.front.request.grammar import Grammar
from gpu_worker.front.request.request import SamplingParams
from gpu_worker.front.row import Row
from gpu_worker.model.attention_plan import Segment
from gpu_worker.native.next_tokens import choose, find_masks
from gpu_worker.native.sampling.sampling import Sampler
from tests.gpu_worker.front.grammar.small_vocabulary import compiled
from tests.gpu_worker.rows import row_of

GREEDY = SamplingParams(temperature=0)


def test_only_rows_whose_last_token_was_computed_get_a_token() -> None:
    chunk, whole, decode = row_of(tokens=range(5)), row_of(tokens=range(3)), row_of(tokens=range(4))
    for row in (chunk, whole, decode):
        row.sampling = GREEDY
    part = [(chunk, Segment(0, 0, 4, 0)), (whole, Segment(1, 4, 3, 0)), (decode, Segment(2, 7, 1, 3))]
    logits = torch.nn.functional.one_hot(torch.tensor([11, 22]), 40).float()
    chosen = choose(part, logits, Sampler())
    assert (chosen.rows, chosen.tokens, chosen.scores) == ([whole, decode], [11, 22], [None, None])
    assert chosen.logits is logits


def test_a_row_has_a_score_if_its_request_wants_one_and_nothing_if_its_logits_are_not_finite() -> None:
    rows = [row_of(sampling=SamplingParams(temperature=0, logprobs=wanted)) for wanted in (None, 1, 1)]
    logits = torch.zeros(3, 40)
    logits[:2, 9], logits[2, 0] = 5.0, torch.nan
    part = [(row, Segment(number, number, 1, 0)) for number, row in enumerate(rows)]
    chosen = choose(part, logits, Sampler())
    assert chosen.tokens == [9, 9, None]
    assert [score and [i for i, _ in score.top] for score in chosen.scores] == [None, [9], None]


def test_prompt_tokens_are_scored_after_the_rows_with_a_token() -> None:
    """The row of five tokens is computed up to the fourth; the whole one is scored up to its last token."""
    scored = SamplingParams(temperature=0, prompt_logprobs=2)
    chunk, whole = row_of(tokens=range(5), sampling=scored), row_of(tokens=(7, 8, 9), sampling=scored)
    part = [(chunk, Segment(0, 0, 4, 0)), (whole, Segment(1, 4, 3, 0))]
    ids = torch.tensor([30, 1, 2, 39, 4, 8, 9])  # of the new token, four of the chunk, two of the whole prompt
    logits = torch.nn.functional.one_hot(ids, 40).float() * 9
    chosen = choose(part, logits, Sampler())
    assert (chosen.rows, chosen.tokens) == ([whole], [30])
    assert [row for row, _ in chosen.prompts] == [chunk, whole]
    for row, scores in chosen.prompts:
        row.prompt_offsets = range(5)
        row.add_prompt_scores(scores)
    assert [entry.token_id for entry in chunk.prompt] == [0, 1, 2, 3, 4]
    assert [entry.rank for entry in chunk.prompt] == [None, 1, 1, 5, 1], (
        "39 is likelier than 3, and 0 to 2 are as likely"
    )
    assert [entry.top[0][0] for entry in chunk.prompt[1:]] == [1, 2, 39, 4]
    assert [entry.rank for entry in whole.prompt] == [None, 1, 1]
    assert chunk.positions_to_score(0, 5) == range(4, 4) and not chunk.has_unsound_prompt


class Run(GrammarState):
    """A grammar that allows the token 5 after a run."""

    def __init__(self, run: list[int]) -> None:
        super().__init__(compiled(Grammar("regex", "a")), [], 0, 40)
        self.run, self.allowed[0] = run, 1 << 5


def row_with(run: list[int], **changes: object) -> Row:
    return row_of(tokens=range(4), grammar=Run(run), guess=run, sampling=SamplingParams(temperature=0, **changes))  # type: ignore[arg-type]


def test_the_tokens_of_a_run_are_chosen_without_logits() -> None:
    row, other = row_with([7, 8]), row_of(tokens=range(2))
    other.sampling = GREEDY
    part = [(row, Segment(0, 0, 3, 3)), (other, Segment(1, 3, 1, 1))]
    logits = torch.nn.functional.one_hot(torch.tensor([9, 11]), 40).float()
    found = {owner: choices for owner, choices in choose(part, logits, Sampler()).by_row()}
    assert [token for token, _, _ in found[row]] == [7, 8, 5] and [token for token, _, _ in found[other]] == [11]
    assert found[row][0][2] is None and torch.equal(found[row][2][2], logits[0])  # type: ignore[arg-type]
    logits[0, 3] = torch.nan
    [unsound, *_] = (choices for _, choices in choose(part, logits, Sampler()).by_row())
    assert [token for token, _, _ in unsound] == [None], "the run's own logits may not be finite either"


def test_a_run_has_logits_where_its_segment_is_cut() -> None:
    cut = choose([(row_with([7, 8]), Segment(0, 0, 2, 3))], torch.zeros(2, 40), Sampler())
    assert (cut.tokens, cut.aheads) == ([7, 8], [0, 1])


def test_masks_are_those_of_the_rows_with_logits_unless_all_logits_are_read() -> None:
    free = row_of(tokens=range(2))
    rows = [row_with([7, 8]), free, row_with([], logprobs=1), row_with([]), row_with([])]
    rows[3].capture_first_logits = True
    part = [(row, Segment(number, number, len(row.guess) + 1, len(row.tokens) - 1)) for number, row in enumerate(rows)]
    finished: list[int] = []
    masks = find_masks(part, lambda: finished.append(1))
    assert [mask is not None for mask in masks] == [True, False, False, False, True] and finished == [1]
    assert only_id(masks[0]) == only_id(masks[4]) == 5  # type: ignore[arg-type]


def test_a_step_of_prompt_chunks_alone_chooses_nothing() -> None:
    chosen = choose([(row_of(tokens=range(5)), Segment(0, 0, 2, 0))], torch.zeros(0, 40), Sampler())
    assert (chosen.rows, chosen.tokens, chosen.scores) == ([], [], [])
