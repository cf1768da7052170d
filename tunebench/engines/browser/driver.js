// What a program that drives the page calls: every answer is {value}, or {error, stack} with a stack where it is no
// user's mistake.

import { Model, PlanError, openAdapter, openDevice, splitPrompt, spread } from "./runner.js";

let opened = null; // one device serves all plans of a page
const models = [];

const open = () =>
  (opened ??= openAdapter().then(async ({ adapter, facts }) => ({ facts, device: await openDevice(adapter) })));

const calls = {
  facts: async () => (await openAdapter()).facts,

  /** Compile the plan under a URL; its number. */
  async prepare(url) {
    const { device, facts } = await open();
    return models.push(await Model.prepare(device, facts.lanes, url)) - 1;
  },

  /** Load its weights, or share those of another plan. */
  fill: async (number, beside) => models[number].fill(beside === null ? null : models[beside]),

  /** Run steps, each of the plan that it names, and wait for them. */
  async run(steps) {
    for (const step of steps) models[step.plan].run(step);
    await models[0].wait();
  },

  /** The last step's logits, float32 in base64. */
  async logits(number) {
    const bytes = new Uint8Array((await models[number].logits()).buffer);
    const parts = [];
    for (let at = 0; at < bytes.length; at += 8192) parts.push(String.fromCharCode(...bytes.subarray(at, at + 8192)));
    return btoa(parts.join(""));
  },

  measure: (number, steps) => models[number].measure(steps),
  chunks: async (...given) => splitPrompt(...given),
  spread: async (blocks) => spread(blocks),
};

export async function call(name, given) {
  try {
    return { value: await calls[name](...given) };
  } catch (error) {
    return { error: error.message, stack: error instanceof PlanError ? "" : String(error.stack) };
  }
}
