"""Open WebUI, LibreChat, Continue, Cline, CodeCompanion, Cursor, Copilot, vllm bench, guidellm, lm-eval (shapes)"""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import yaml

# By client: the path, and the fields that its sources and documentation say it sends.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = yaml.safe_load("""
Open WebUI, a chat:
- chat/completions
- {stream: true, stream_options: &usage {include_usage: true}, chat_id: c, session_id: s, id: m,
   features: {web_search: false, image_generation: false}, variables: {"{{USER_NAME}}": A},
   background_tasks: {title_generation: true}, model_item: {id: auto}, params: {}, tool_servers: [],
   messages: [{role: user, content: Hi, id: "1"}]}
Open WebUI, a title:
- chat/completions
- {stream: false, max_completion_tokens: 1000, metadata: {task: title_generation},
   messages: [{role: user, content: Generate a title}]}
Open WebUI with the options of a local runner:
- chat/completions
- {keep_alive: 5m, options: {num_ctx: 4096}, think: false, messages: [{role: user, content: Hi}]}
LibreChat:
- chat/completions
- {stream: true, user: u, temperature: 1, top_p: 1, presence_penalty: 0, frequency_penalty: 0,
   messages: [&system {role: system, content: You write code.}, {role: user, content: Hi, name: A}]}
Continue, a chat:
- chat/completions
- {stream: true, stream_options: *usage, max_tokens: 4096, temperature: 0.5,
   messages: &turns [*system, &turn {role: user, content: [{type: text, text: Hi}]}]}
Continue, an autocompletion:
- completions
- {stream: true, prompt: "def add(a, b):", suffix: "", max_tokens: 64, temperature: 0.01, stop: ["\\n\\n", "```"]}
Cline:
- chat/completions
- {stream: true, stream_options: *usage, temperature: 0, reasoning_effort: medium, tool_choice: auto,
   tools: [{type: function, function: {name: read_file, parameters: {type: object}}}],
   messages: [{role: developer, content: [&part {type: text, text: Hi, cache_control: &kind {type: ephemeral}}]},
     {role: user, content: [*part]},
     {role: assistant, content: Hm, reasoning_content: think,
      tool_calls: [{id: c1, type: function, index: 0, function: {name: read_file, arguments: "{}"}}]},
     {role: tool, tool_call_id: c1, content: [*part], name: read_file}]}
CodeCompanion:
- chat/completions
- {stream: true, tool_choice: auto, parallel_tool_calls: false,
   messages: [{role: user, content: Hi, id: 1, opts: {visible: true}, cycle: 1}]}
Cursor:
- chat/completions
- {stream: true, stream_options: *usage, temperature: 0, user: u, metadata: {cursorConversationId: c}, messages: *turns}
Copilot, chats:
- chat/completions
- {stream: true, stream_options: *usage, temperature: 0.1, top_p: 1, n: 1,
   messages: [*system, *turn, {role: user, content: Hi, copilot_cache_control: *kind}]}
vllm bench serve:
- completions
- {stream: true, stream_options: *usage, prompt: Hi, repetition_penalty: 1.0, max_tokens: 64, logprobs: null,
   ignore_eos: true, temperature: 0.0, lora: {strategy: mixture, k: 3}}
lm-eval, the score of a prompt:
- completions
- {prompt: [[72, 101, 108]], temperature: 0, max_tokens: 1, logprobs: 1, seed: 1234, echo: true}
lm-eval, an answer:
- completions
- {prompt: [[79, 110]], temperature: 0.0, max_tokens: 20, stop: ["\\n", </s>], seed: 1234}
guidellm:
- chat/completions
- {stream: true, stream_options: {include_usage: true, continuous_usage_stats: true}, max_completion_tokens: 64,
   stop: null, ignore_eos: true, lora: {k: 2}, messages: [*turn]}
Copilot, responses:
- responses
- {stream: true, store: true, truncation: disabled, include: [reasoning.encrypted_content], tools: null,
   reasoning: {effort: medium, summary: detailed},
   input: [{role: system, content: [{type: input_text, text: You write code.}]},
     {role: user, content: &said [{type: input_text, text: Hi}]},
     {type: reasoning, id: r, summary: [], encrypted_content: x},
     {type: message, role: assistant, id: msg_123, status: completed,
      content: [{type: output_text, text: Hm, annotations: []}]},
     {role: user, content: *said}]}
""")


@pytest.mark.parametrize(("path", "body"), SHAPES.values(), ids=SHAPES.keys())
def test_a_known_shape_is_answered(server_url: str, path: str, body: dict[str, Any]) -> None:
    """chats, completions and responses with the fields that these clients are known to send"""
    response = httpx.post(f"{server_url}/{path}", json={"model": "auto", **body}, timeout=30)
    assert response.status_code == 200, response.text
    assert "Hel" in response.text


def test_a_name_is_picked_from_the_list(server_url: str, model_name: str) -> None:
    """model names and their policies"""
    cards = {card["id"]: card for card in httpx.get(f"{server_url}/models").json()["data"]}
    path, body = SHAPES["Open WebUI, a chat"]
    picked = {"model": model_name, "model_item": cards[model_name]}  # it sends the card of the list back
    response = httpx.post(f"{server_url}/{path}", json={**body, **picked}, timeout=30)
    assert response.status_code == 200, response.text
    headers = response.headers
    assert headers["x-lora-policy"].startswith(f"{model_name}@") and headers["x-lora-adapters"].startswith("coder@")


def test_a_response_that_cannot_be_continued_is_refused_by_the_code_that_clients_know(server_url: str) -> None:
    """continued responses are refused with the code after which clients send the whole conversation"""
    body = {"model": "auto", "input": "Hi", "previous_response_id": "resp_1"}
    response = httpx.post(f"{server_url}/responses", json=body, timeout=30)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "previous_response_not_found")
