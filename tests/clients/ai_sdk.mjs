// Cases of the Vercel AI SDK.
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const url = process.argv[2];
const openai = createOpenAI({ baseURL: url, apiKey: "none" });
const prompt = "Hi";
const schema = z.object({ name: z.string(), age: z.number().int() });
const weather = tool({
  description: "Tell the weather",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `Rain in ${city}`,
});
// The server stores no responses, so a loop sends the calls themselves, and no references to them.
const loop = {
  prompt: "How is it in 'Rome'?",
  tools: { weather },
  stopWhen: stepCountIs(3),
  maxRetries: 0,
  providerOptions: { openai: { store: false } },
};
const providers = { responses: openai("auto"), chat: openai.chat("auto") };
const both = (run) => async () =>
  Object.fromEntries(await Promise.all(Object.entries(providers).map(async ([name, model]) => [name, await run(model)])));

async function text(stream) {
  let found = "";
  for await (const piece of stream) found += piece;
  return found;
}

const cases = {
  generateText: both(async (model) => {
    const answer = await generateText({ model, instructions: "Be brief", prompt, maxRetries: 0 });
    return { text: answer.text, reason: answer.finishReason, tokens: answer.usage.outputTokens };
  }),
  streamText: both(async (model) => {
    const answer = streamText({ model, prompt, maxRetries: 0 });
    return { text: await text(answer.textStream), reason: await answer.finishReason };
  }),
  generateObject: both(async (model) => (await generateObject({ model, schema, prompt, maxRetries: 0 })).object),
  streamObject: both(async (model) => {
    const answer = streamObject({ model, schema, prompt, maxRetries: 0 });
    await text(answer.textStream);
    return await answer.object;
  }),
  tools: both(async (model) => {
    const answer = await generateText({ ...loop, model });
    const steps = answer.steps.map((step) => step.toolCalls.map((call) => [call.toolName, call.input]));
    return { steps, ran: answer.steps[0].toolResults.map((result) => result.output), text: answer.text };
  }),
  streamedTools: both(async (model) => {
    const answer = streamText({ ...loop, model });
    return { text: await text(answer.textStream), calls: (await answer.steps)[0].toolCalls.map((call) => call.input) };
  }),
  conversation: both(async (model) => {
    const messages = [
      { role: "user", content: prompt },
      { role: "assistant", content: "Hello" },
      { role: "user", content: "And now?" },
    ];
    return (await generateText({ model, messages, maxRetries: 0 })).text;
  }),
  continued: async () => {
    const options = { model: openai("auto"), maxRetries: 0 };
    const earlier = await generateText({ ...options, prompt });
    const messages = [{ role: "user", content: prompt }, ...earlier.response.messages, { role: "user", content: "More" }];
    const providerOptions = { openai: { store: false } };
    return (await generateText({ ...options, messages, providerOptions })).text;
  },
  unknownModel: async () => await generateText({ model: openai("nobody"), prompt, maxRetries: 0 }),
};
