// The npm client against a server: node openai_client.mjs URL; the package is found beside this file's copy.
import OpenAI from "openai";
import assert from "node:assert";

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0, timeout: 120_000 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const asked = { model: (await client.models.list()).data[0].id, messages, temperature: 0, max_tokens: 20 };

const whole = await client.chat.completions.create(asked);
assert.equal(whole.choices[0].message.content, "The capital of France is Paris.");

let text = "";
let usage = null;
const options = { include_usage: true };
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true, stream_options: options })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);

const parameters = {
  type: "object", properties: { city: { enum: ["Paris", "Rome"] } }, required: ["city"], additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters, strict: true } }];
const called = await client.chat.completions.create({ ...asked, max_tokens: 60, tools, tool_choice: "required" });
const [call] = called.choices[0].message.tool_calls;
assert.equal(call.function.name, "weather");
assert.ok(["Paris", "Rome"].includes(JSON.parse(call.function.arguments).city));

const stream = client.responses.stream({ model: asked.model, input: messages[0].content, temperature: 0 });
const response = await stream.finalResponse();
assert.equal(response.output_text, "The capital of France is Paris.");

await assert.rejects(client.chat.completions.create({ ...asked, temperature: -1 }), (error) => {
  return error instanceof OpenAI.BadRequestError && error.param === "temperature";
});
console.log("all good");
