"""The requests and answers of `/tokenize` and `/detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator
from typing_extensions import TypedDict

from deployments.api.base import Passing, Text, TolerantRequest, problem
from deployments.api.completions import MAX_MESSAGES, Ids, PromptRequest, Question
from deployments.api.messages import ChatMessage, make_turns
from gpu_worker.front.request.request import Tokenized

NOT_SERVED_IN_TOKENIZE: Passing = {
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "tools": ([],),
}


class TokenizeRequest(PromptRequest):
    """`POST /tokenize`: a text or a conversation."""

    not_served: ClassVar[Passing] = NOT_SERVED_IN_TOKENIZE

    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise problem("prompt", "give either prompt or messages")
        return self

    def question(self) -> Question:
        """Return the prompt as a question, whose adapters may name a template."""
        if self.messages is not None:
            return self._ask(make_turns(self.messages))
        options, alias = self._options(0)
        return Question(self.prompt or "", self.prompt, self.model, options, alias)


class TokenizeAnswer(TypedDict):
    """`token_strs`: the text of each token, if requested."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(TolerantRequest):
    """`POST /detokenize`"""

    model: str = Field(default="auto", min_length=1, max_length=256)
    tokens: Ids


class DetokenizeAnswer(TypedDict):
    prompt: str


def tokenize_answer(request: TokenizeRequest, found: Tokenized) -> TokenizeAnswer:
    """Return the answer of `/tokenize`."""
    return {
        "count": len(found.ids),
        "max_model_len": found.max_len,
        "tokens": list(found.ids),
        "token_strs": list(found.texts) if request.return_token_strs else None,
    }
