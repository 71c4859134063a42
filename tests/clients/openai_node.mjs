// Cases of the `openai` package for Node.
import OpenAI from "openai";
import { zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const url = process.argv[2];
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Hi" }];
const Person = z.object({ name: z.string(), age: z.number().int() });

const parameters = { type: "object", properties: { city: { type: "string" } } };
const weather = { name: "get_weather", parameters };
const asked = [{ role: "user", content: "How is it in 'Rome'?" }];

async function collect(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}

const cases = {
  async chat() {
    const answer = await client.chat.completions.create({ model: "auto", messages });
    return { text: answer.choices[0].message.content, tokens: answer.usage.completion_tokens };
  },
  async chatStream() {
    const options = { stream: true, stream_options: { include_usage: true } };
    const chunks = await collect(await client.chat.completions.create({ model: "auto", messages, ...options }));
    return {
      text: chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""),
      tokens: chunks.at(-1).usage.completion_tokens,
    };
  },
  async completions() {
    return (await client.completions.create({ model: "poet", prompt: "Once" })).choices[0].text;
  },
  async adapters() {
    const body = { model: "auto", messages, lora: { adapters: [{ name: "poet" }] } };
    const { data, response } = await client.chat.completions.create(body).withResponse();
    return { name: data.lora.adapters[0].name, header: response.headers.get("x-lora-adapters") };
  },
  async models() {
    return (await collect(client.models.list())).map((model) => model.id);
  },
  async embeddings() {
    const answer = await client.embeddings.create({ model: "multilingual-e5-small-tasks", input: ["a", "bcd"] });
    return answer.data.map((item) => item.embedding);
  },
  async responses() {
    const answer = await client.responses.create({ model: "auto", input: "Hi", instructions: "Be brief" });
    return { text: answer.output_text, status: answer.status, tokens: answer.usage.output_tokens };
  },
  async responsesStream() {
    const stream = client.responses.stream({ model: "auto", input: "Hi" });
    const events = await collect(stream);
    return { first: events[0].type, last: events.at(-1).type, text: (await stream.finalResponse()).output_text };
  },
  async responsesParse() {
    const text = { format: zodTextFormat(Person, "person") };
    return (await client.responses.parse({ model: "auto", input: "Hi", text })).output_parsed;
  },
  async tools() {
    const answer = await client.responses.create({ model: "auto", input: asked, tools: [{ type: "function", ...weather }] });
    const [call] = answer.output;
    const result = { type: "function_call_output", call_id: call.call_id, output: "Rain" };
    const final = await client.responses.create({ model: "auto", input: [...asked, call, result] });
    const tools = [{ type: "function", function: weather }];
    const chat = await client.chat.completions.create({ model: "auto", messages: asked, tools });
    const called = chat.choices[0].message.tool_calls[0].function;
    return { responses: [call.name, call.arguments], chat: [called.name, called.arguments], final: final.output_text };
  },
  async unknownModel() {
    return await client.chat.completions.create({ model: "nobody", messages });
  },
};
