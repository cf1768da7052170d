// The page for people: what will run and on what, how loading goes on, speed, and greedily decoded tokens.

import { call } from "./driver.js";
import { Model, PlanError, openAdapter, openDevice } from "./runner.js";

const MIB = 2 ** 20;
const PROMPT = 128; // tokens, where the context has room
const GENERATED = 32;
const $ = (id) => document.getElementById(id);
const count = (value) => value.toLocaleString("en");
const size = (bytes) =>
  bytes >= MIB ? `${count(Math.round(bytes / MIB))} MiB` : `${(bytes / 1024).toFixed(bytes < 10240 ? 1 : 0)} KiB`;

function fill(list, rows) {
  list.replaceChildren(
    ...rows.flatMap(([term, words]) =>
      [
        ["dt", term],
        ["dd", words],
      ].map(([tag, text]) => Object.assign(document.createElement(tag), { textContent: text })),
    ),
  );
}

function chip(into, text) {
  into.append(Object.assign(document.createElement("span"), { textContent: text }));
}

function fail(error) {
  $("error").textContent = error instanceof PlanError ? error.message : String(error.stack ?? error);
  $("error").hidden = false;
}

function showAdapter({ name, software, lanes, features, limits }) {
  const has = (feature) => (features.includes(feature) ? "yes" : "no");
  fill($("adapter"), [
    ["name", name],
    ["kind", software ? "software, on the CPU" : "hardware"],
    ["float16 (shader-f16)", has("shader-f16")],
    ["subgroups", features.includes("subgroups") ? (lanes ? `${lanes} lanes` : "lanes vary") : "no"],
    ["timestamps", has("timestamp-query")],
    ["largest buffer", size(Math.min(limits.maxBufferSize, limits.maxStorageBufferBindingSize))],
    ["threads of a block", count(limits.maxComputeInvocationsPerWorkgroup)],
    ["shared memory of a block", size(limits.maxComputeWorkgroupStorageSize)],
    ["buffers of a kernel", limits.maxStorageBuffersPerShaderStage],
  ]);
  features.forEach((feature) => chip($("features"), feature));
  fill(
    $("limits"),
    Object.entries(limits).map(([limit, value]) => [limit, count(value)]),
  );
}

function showPlan({ facts, buffers, shaders, steps }) {
  const bytes = (...kinds) => size(buffers.reduce((sum, each) => sum + (kinds.includes(each.kind) ? each.bytes : 0), 0));
  const name = facts.model.split(/[\\/]/).at(-1).replace(/\.json$/, "");
  $("title").textContent = `${name} in ${facts.scheme}`;
  document.title = `${name} ${facts.scheme} – TuneBench`;
  fill($("plan"), [
    ["model", name],
    ["scheme", facts.scheme],
    ["batch", facts.batch],
    ["context", count(facts.context)],
    ["vocabulary", count(facts.vocab_size)],
    ["prompts run in chunks of", [...facts.chunks, 1].sort((a, b) => b - a).join(", ")],
    ["kernels", count(Object.keys(shaders).length)],
    ["launches of a decode step", count(steps[1].launches.length)],
    ["weights", bytes("weight")],
    ["KV cache", bytes("cache")],
    ["between kernels", bytes("scratch", "output")],
  ]);
}

function showProgress(stage, done, total) {
  if (stage === "plan") return showPlan(done);
  if (!$("error").hidden) return; // kernels that were under way when one failed
  $("stage").textContent = stage === "shaders" ? "Compiling kernels" : "Loading weights";
  $("amount").textContent = stage === "shaders" ? `${done} of ${total}` : `${size(done)} of ${size(total)}`;
  Object.assign($("progress"), { value: done, max: total });
}

/** Run something for a form, its buttons disabled meanwhile. */
function onSubmit(form, run) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    $("error").hidden = true;
    enable(false);
    await run(form.elements).catch(fail);
    enable(true);
  });
}

function enable(ready) {
  document.querySelectorAll("button").forEach((button) => (button.disabled = !ready));
}

function number(field) {
  if (!/^\d+$/.test(field.value)) throw new PlanError(`“${field.value}” is no whole number.`);
  return Number(field.value);
}

function randomTokens(n, vocabulary) {
  return Array.from({ length: n }, () => Math.floor(Math.random() * vocabulary));
}

function checkRoom(end, context) {
  if (end > context) throw new PlanError(`${end} positions are needed, and the context has ${context}.`);
}

async function bench(model, fields) {
  const { context, vocab_size: vocabulary, batch } = model.facts;
  const [prompt, generated, depth, samples] = ["prompt", "generated", "depth", "samples"].map((n) => number(fields[n]));
  const at = depth ? ` @ d${depth}` : "";
  const tests = [];
  if (prompt) tests.push([`pp${prompt}${at}`, prompt, () => model.prompt(randomTokens(prompt, vocabulary), depth)]);
  const decode = () => randomTokens(generated, vocabulary).map((token, i) => model.decode(token, depth + i));
  if (generated) tests.push([`tg${generated}${at}`, generated, decode]);
  for (const [, tokens] of tests) checkRoom(depth + tokens, context);
  $("results").hidden = false;
  for (const [name, tokens, steps] of tests) {
    const row = $("results").tBodies[0].insertRow();
    const taken = [];
    await model.measure(steps()); // a warm-up
    for (let i = 0; i < samples; i++) {
      taken.push(await model.measure(steps()));
      showRow(row, name, tokens * batch, taken);
    }
  }
}

function showRow(row, name, tokens, taken) {
  const walls = taken.map(({ wallMs }) => wallMs).sort((a, b) => a - b);
  const devices = taken.map(({ deviceMs }) => deviceMs).sort((a, b) => a - b);
  const rate = (ms) => (1000 * tokens) / ms;
  const figure = (value) => (value >= 100 ? count(Math.round(value)) : value.toPrecision(3));
  const wall = middle(walls);
  const cells = [
    name,
    figure(rate(wall)),
    `${figure(rate(walls.at(-1)))} to ${figure(rate(walls[0]))}`,
    figure(wall / tokens),
    devices[0] === null ? "not measured" : figure(middle(devices) / tokens),
    taken.length,
  ];
  row.replaceChildren(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
}

function middle(sorted) {
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

async function greedy(model, fields) {
  const { context, vocab_size: vocabulary, batch } = model.facts;
  const words = fields.tokens.value.split(/[\s,]+/).filter(Boolean);
  const wrong = words.find((word) => !/^\d+$/.test(word) || Number(word) >= vocabulary);
  if (wrong !== undefined || !words.length)
    throw new PlanError(`“${wrong ?? ""}” is no token id: write numbers below ${vocabulary}, e.g. 1, 15, 7.`);
  const prompt = words.map(Number);
  const generated = number(fields.generated);
  checkRoom(prompt.length + generated, context);
  $("tokens").replaceChildren();
  const start = performance.now();
  for (const step of model.prompt(prompt, 0)) model.run(step);
  for (let i = 0; i < generated; i++) {
    const token = largest((await model.logits()).subarray(0, vocabulary));
    chip($("tokens"), token);
    if (i + 1 < generated) model.run(model.decode(token, prompt.length + i));
  }
  const seconds = (performance.now() - start) / 1000;
  $("rate").textContent =
    `${generated} tokens after a prompt of ${prompt.length} in ${seconds.toPrecision(3)} s: ` +
    `${(generated / seconds).toPrecision(3)} tokens/s, the logits read back for each` +
    (batch > 1 ? `; the first of ${batch} equal sequences is shown.` : ".");
}

function largest(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

async function main() {
  const { adapter, facts } = await openAdapter();
  showAdapter(facts);
  const device = await openDevice(adapter);
  $("stage").textContent = "Reading the plan";
  const model = await Model.prepare(device, facts.lanes, "plan", showProgress);
  await model.fill(null, showProgress);
  $("stage").textContent = "Ready";
  const { context, vocab_size: vocabulary } = model.facts;
  const room = Math.min(PROMPT, Math.floor(context / 2));
  $("bench").elements.prompt.value = room;
  $("bench").elements.generated.value = Math.min(GENERATED, context - room);
  $("greedy").elements.tokens.value = Array.from({ length: 12 }, (_, i) => (i * 37 + 1) % vocabulary).join(", ");
  $("clock").textContent = model.timer
    ? "Tokens a second are by the wall clock; the device's share is by its timestamps, which browsers round to 0.1 ms."
    : "By the wall clock: this adapter has no timestamps.";
  onSubmit($("bench"), (fields) => bench(model, fields));
  onSubmit($("greedy"), (fields) => greedy(model, fields));
  enable(true);
}

if (location.search === "?driven") {
  $("title").textContent = "Driven by a program.";
  document.querySelector("main").hidden = true;
  window.tunebench = call;
} else {
  main().catch((error) => {
    $("stage").textContent = "Stopped";
    fail(error);
  });
}
