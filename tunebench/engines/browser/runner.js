// Runs a plan (see tunebench/plan.py) on WebGPU: buffers, pipelines and bind groups are made once, a step only
// encodes its dispatches. It knows nothing of the page around it.

const MOST_BLOCKS = 65535; // along one axis of a grid
const FEATURES = ["shader-f16", "subgroups", "timestamp-query"];
const LIMITS = [
  "maxStorageBufferBindingSize",
  "maxBufferSize",
  "maxComputeWorkgroupStorageSize",
  "maxComputeInvocationsPerWorkgroup",
  "maxComputeWorkgroupSizeX",
  "maxComputeWorkgroupSizeY",
  "maxComputeWorkgroupSizeZ",
  "maxStorageBuffersPerShaderStage",
];
const LANES = 32; // that TVM's kernels with subgroups are written for
const PATIENCE_MS = 20000; // for an adapter: a broken driver may never answer
const PART_BYTES = 32 * 2 ** 20; // of a tensor, fetched at once

/** What a user can do something about: it is shown without a stack. */
export class PlanError extends Error {}

/** The adapter, and what there is to know about it as plain data. */
export async function openAdapter() {
  if (!navigator.gpu) throw new PlanError("this browser has no WebGPU (or the page is not on localhost or https).");
  const late = new Promise((resolve) => setTimeout(resolve, PATIENCE_MS, null));
  const adapter = await Promise.race([navigator.gpu.requestAdapter({ powerPreference: "high-performance" }), late]);
  if (!adapter) throw new PlanError("this browser has no WebGPU adapter, or none that answers.");
  const { vendor, architecture, device, description, subgroupMinSize, subgroupMaxSize } = adapter.info;
  const limits = {};
  for (const name in adapter.limits) limits[name] = adapter.limits[name];
  const facts = {
    name: [vendor, architecture, device, description].filter(Boolean).join(" ") || "unnamed adapter",
    software: Boolean(adapter.info.isFallbackAdapter),
    browser: navigator.userAgent,
    lanes: subgroupMinSize === subgroupMaxSize ? (subgroupMinSize ?? 0) : 0, // of a subgroup, where it has one size
    features: [...adapter.features].sort(),
    limits,
  };
  return { adapter, facts };
}

/** A device with those of `FEATURES` that there are, and all of the adapter's `LIMITS`. */
export async function openDevice(adapter) {
  const device = await adapter.requestDevice({
    requiredFeatures: FEATURES.filter((name) => adapter.features.has(name)),
    requiredLimits: Object.fromEntries(LIMITS.map((name) => [name, adapter.limits[name]])),
  });
  device.failure = null; // what went wrong outside of an error scope; `wait` raises it
  device.addEventListener("uncapturederror", ({ error }) => (device.failure ??= error.message));
  device.lost.then(({ message, reason }) => (device.failure ??= `the device was lost (${reason}): ${message}`));
  return device;
}

/** The cut of n tokens, before which `room` positions are free, that takes the least time. */
function fastest(n, room, sizes, chunkNs) {
  const best = [{ ns: 0 }];
  for (let left = 1; left <= n; left++) {
    for (const size of sizes) {
      if (size > left && n - left + size > room) continue;
      const ns = chunkNs[size] + best[Math.max(0, left - size)].ns;
      if (!best[left] || ns < best[left].ns) best[left] = { ns, size };
    }
  }
  const found = [];
  for (let left = n; left > 0; left -= found.at(-1).valid) {
    found.push({ chunk: best[left].size, valid: Math.min(left, best[left].size) });
  }
  return found;
}

/** How a prompt of n tokens is served; the same as `split_prompt` in engines/chunked.py. */
export function splitPrompt(n, position, chunks, context, chunkNs = {}) {
  const sizes = [...new Set([...chunks, 1])].sort((a, b) => b - a);
  if (sizes.every((size) => size in chunkNs)) return fastest(n, context - position, sizes, chunkNs);
  const found = [];
  let left = n;
  for (const chunk of [...chunks].sort((a, b) => b - a)) {
    while (left >= chunk || (left > Math.floor(chunk / 2) && position + n - left + chunk <= context)) {
      const valid = Math.min(left, chunk);
      found.push({ chunk, valid });
      left -= valid;
    }
  }
  for (; left > 0; left--) found.push({ chunk: 1, valid: 1 });
  return found;
}

/** Blocks along x beyond what a grid may have, along z, where TVM's shaders look for them. */
export function spread([x, y, z]) {
  while (x > MOST_BLOCKS) [x, z] = [Math.ceil(x / 2), z * 2];
  return [x, y, z];
}

const padded = (bytes) => Math.ceil(bytes / 4) * 4;

async function get(url, range) {
  const answer = await fetch(url, range ? { headers: { Range: `bytes=${range[0]}-${range[1] - 1}` } } : {});
  if (!answer.ok) throw new PlanError(`${url}: ${answer.status} ${answer.statusText}`);
  if (range && answer.status !== 206) throw new PlanError(`${url}: the server does not answer range requests.`);
  return answer;
}

/** A safetensors file on a server, read a part at a time. */
class Tensors {
  static async open(url) {
    const head = await (await get(url, [0, 8])).arrayBuffer();
    const length = Number(new DataView(head).getBigUint64(0, true));
    const header = await (await get(url, [8, 8 + length])).json();
    return new Tensors(url, 8 + length, header);
  }

  constructor(url, start, header) {
    Object.assign(this, { url, start, header });
  }

  bytes(name) {
    const [begin, end] = this.header[name].data_offsets;
    return end - begin;
  }

  /** A tensor's parts in order, as [offset, ArrayBuffer]; each part but the last is a multiple of four bytes. */
  async *parts(name) {
    const [begin, end] = this.header[name].data_offsets;
    for (let at = begin; at < end; at += PART_BYTES) {
      const range = [this.start + at, this.start + Math.min(at + PART_BYTES, end)];
      yield [at - begin, await (await get(this.url, range)).arrayBuffer()];
    }
  }
}

/** A plan on a device. `prepare` compiles it, `fill` loads weights; then `run`, `wait` and `logits`. */
export class Model {
  /** Sources fetched, checked and compiled. */
  static async prepare(device, lanes, url, onProgress = () => {}) {
    const plan = await (await get(`${url}/plan.json`)).json();
    if (plan.format !== "tunebench-plan" || plan.version !== 2)
      throw new PlanError(`version ${plan.version} of ${plan.format} is not version 2 of tunebench-plan.`);
    if (plan.language !== "wgsl")
      throw new PlanError(`the plan's kernels are in ${plan.language}, and a browser takes wgsl: export for webgpu.`);
    onProgress("plan", plan);
    const model = new Model(device, url, plan);
    let done = 0;
    const compiled = await Promise.all(
      Object.entries(plan.shaders).map(async ([name, shader]) => {
        const source = await (await get(`${url}/${shader.source}`)).text();
        model.#check(name, shader, source, lanes);
        const pipeline = await model.#compile(name, shader, source);
        onProgress("shaders", ++done, Object.keys(plan.shaders).length);
        return [name, pipeline];
      }),
    );
    model.pipelines = new Map(compiled);
    return model;
  }

  constructor(device, url, plan) {
    Object.assign(this, { device, url, plan, facts: plan.facts });
    this.layouts = new Map(); // by which bindings are written
    this.uniforms = new Map(); // by the last block
    this.buffers = [];
    this.steps = new Map(); // by chunk size
    this.last = null; // the step that ran last
    this.timer = device.features.has("timestamp-query") ? this.#timer() : null;
  }

  #check(name, { threads, writes }, source, lanes) {
    const { limits, features } = this.device;
    const refuse = (words) => {
      throw new PlanError(`kernel ${name} ${words}.`);
    };
    if (/\benable\s+f16\b/.test(source) && !features.has("shader-f16"))
      refuse("is in float16, and this adapter lacks the feature shader-f16: choose a float32 scheme, e.g. q4f32_1");
    if (/\bsubgroup(s;|[A-Z])/.test(source) && !features.has("subgroups"))
      refuse("needs the feature subgroups, which this adapter lacks");
    if (/\bsubgroup[A-Z]/.test(source) && lanes !== LANES)
      refuse(`needs subgroups of ${LANES} lanes, and this adapter has ${lanes || "no fixed number of them"}`);
    if (writes.length > limits.maxStorageBuffersPerShaderStage)
      refuse(`takes ${writes.length} storage buffers, and this adapter allows ${limits.maxStorageBuffersPerShaderStage}`);
    const size = threads.reduce((a, b) => a * b);
    if (size > limits.maxComputeInvocationsPerWorkgroup)
      refuse(`has blocks of ${size} threads, and this adapter allows ${limits.maxComputeInvocationsPerWorkgroup}`);
  }

  /** Bindings are the buffers in order, then TVM's uniform with the last block along x. */
  #layout(writes) {
    const key = writes.map(Number).join("");
    if (!this.layouts.has(key)) {
      const kinds = [...writes.map((written) => (written ? "storage" : "read-only-storage")), "uniform"];
      const entries = kinds.map((type, binding) => ({ binding, visibility: GPUShaderStage.COMPUTE, buffer: { type } }));
      this.layouts.set(key, this.device.createBindGroupLayout({ entries }));
    }
    return this.layouts.get(key);
  }

  async #compile(name, shader, source) {
    // Browsers want the extension named; other implementations do not.
    const needs = /\bsubgroup[A-Z]/.test(source) && !/\benable\s+subgroups\b/.test(source) ? "enable subgroups;\n" : "";
    const module = this.device.createShaderModule({ label: name, code: needs + source });
    const layout = this.device.createPipelineLayout({ bindGroupLayouts: [this.#layout(shader.writes)] });
    try {
      return await this.device.createComputePipelineAsync({
        label: name,
        layout,
        compute: { module, entryPoint: shader.entry },
      });
    } catch (error) {
      const { messages } = await module.getCompilationInfo();
      const wrong = messages.find(({ type }) => type === "error");
      const words = wrong ? `line ${wrong.lineNum}: ${wrong.message}` : error.message;
      throw new PlanError(`kernel ${name} does not compile: ${words}`);
    }
  }

  /** Make every buffer, with weights from the server; or take weights and cache from a model that has the same. */
  async fill(beside = null, onProgress = () => {}) {
    const shared = new Map();
    beside?.plan.buffers.forEach(({ name, kind }, i) => {
      if (["weight", "constant", "cache"].includes(kind)) shared.set(name, beside.buffers[i]);
    });
    const tensors = beside ? null : await Tensors.open(`${this.url}/model.safetensors`);
    const stored = ({ kind }) => kind === "weight" || kind === "constant";
    const missing = tensors ? this.plan.buffers.filter((each) => stored(each) && !tensors.header[each.name]) : [];
    if (missing.length) throw new PlanError(`weights are missing: ${missing.map(({ name }) => name).join(", ")}.`);
    const total = this.plan.buffers.filter(stored).reduce((sum, { bytes }) => sum + bytes, 0);
    let loaded = 0;
    for (const each of this.plan.buffers) {
      const known = shared.get(each.name);
      const buffer = known ?? (await this.#allocate(each));
      this.buffers.push(buffer);
      if (known) continue;
      if (stored(each)) {
        for await (const [offset, data] of tensors.parts(each.name)) {
          this.#write(buffer, offset, data);
          onProgress("weights", (loaded += data.byteLength), total);
        }
      } else if (each.kind === "cache") await this.#fillCache(tensors, each, buffer);
    }
    for (const [length, step] of Object.entries(this.plan.steps)) this.steps.set(Number(length), this.#bind(step));
    this.inputs = Object.fromEntries(
      this.plan.buffers.flatMap(({ name, kind }, i) => (kind === "input" ? [[name, this.buffers[i]]] : [])),
    );
    await this.wait();
  }

  async #allocate({ name, bytes }) {
    const most = Math.min(this.device.limits.maxBufferSize, this.device.limits.maxStorageBufferBindingSize);
    if (bytes > most)
      throw new PlanError(
        `${name} needs a buffer of ${Math.ceil(bytes / 2 ** 20)} MiB, and this adapter allows ${most >> 20} MiB: ` +
          "choose fewer bits, a smaller context, or another model.",
      );
    this.device.pushErrorScope("out-of-memory");
    const { STORAGE, COPY_DST, COPY_SRC } = GPUBufferUsage;
    const buffer = this.device.createBuffer({ label: name, size: padded(bytes), usage: STORAGE | COPY_DST | COPY_SRC });
    if (await this.device.popErrorScope()) throw new PlanError(`no device memory is left for ${name}.`);
    return buffer;
  }

  #write(buffer, offset, data) {
    if (data.byteLength % 4) {
      const whole = new Uint8Array(padded(data.byteLength));
      whole.set(new Uint8Array(data));
      data = whole.buffer;
    }
    this.device.queue.writeBuffer(buffer, offset, data);
  }

  /** The same contents for each sequence and head, as a test at depth needs something in the cache. */
  async #fillCache(tensors, { name, shape, bytes, dtype }, buffer) {
    const tile = `cache.${dtype}.${shape.slice(-2).join("x")}`;
    if (!tensors.header[tile]) throw new PlanError(`contents for ${name} are missing: ${tile}.`);
    const size = tensors.bytes(tile);
    this.tiles ??= new Map();
    if (!this.tiles.has(tile)) {
      const whole = new Uint8Array(size);
      for await (const [offset, data] of tensors.parts(tile)) whole.set(new Uint8Array(data), offset);
      this.tiles.set(tile, whole);
    }
    for (let at = 0; at < bytes; at += size) this.device.queue.writeBuffer(buffer, at, this.tiles.get(tile));
  }

  /** The uniform in which TVM's shaders find the last block along x. */
  #uniform(value) {
    if (!this.uniforms.has(value)) {
      const { UNIFORM, COPY_DST } = GPUBufferUsage;
      const buffer = this.device.createBuffer({ size: 16, usage: UNIFORM | COPY_DST });
      this.device.queue.writeBuffer(buffer, 0, new Uint32Array([value, 0, 0, 0]));
      this.uniforms.set(value, buffer);
    }
    return this.uniforms.get(value);
  }

  #bind({ launches, logits }) {
    const calls = launches.map(({ shader, buffers, blocks }) => {
      const bound = [...buffers.map((i) => this.buffers[i]), this.#uniform(blocks[0] - 1)];
      const entries = bound.map((buffer, binding) => ({ binding, resource: { buffer } }));
      const layout = this.#layout(this.plan.shaders[shader].writes);
      const group = this.device.createBindGroup({ label: shader, layout, entries });
      return { pipeline: this.pipelines.get(shader), group, blocks: spread(blocks) };
    });
    return { calls, logits: this.buffers[logits] };
  }

  /** Hand one step to the device: int32 tokens [batch * length]; the logits of `lastToken` are kept. */
  run({ length, tokens, position, lastToken }, timestampWrites) {
    const { queue } = this.device;
    const step = this.steps.get(length);
    queue.writeBuffer(this.inputs[`tokens.${length}`], 0, new Int32Array(tokens));
    queue.writeBuffer(this.inputs.position, 0, new Int32Array([position]));
    queue.writeBuffer(this.inputs.last_token, 0, new Int32Array([lastToken]));
    const encoder = this.device.createCommandEncoder();
    const pass = encoder.beginComputePass(timestampWrites ? { timestampWrites } : {});
    let current = null;
    for (const { pipeline, group, blocks } of step.calls) {
      if (pipeline !== current) pass.setPipeline((current = pipeline));
      pass.setBindGroup(0, group);
      pass.dispatchWorkgroups(...blocks);
    }
    pass.end();
    queue.submit([encoder.finish()]);
    this.last = step;
  }

  /** Until the device is done. */
  async wait() {
    await this.device.queue.onSubmittedWorkDone();
    if (this.device.failure) throw new PlanError(this.device.failure);
  }

  /** The last step's logits, float32 [batch * vocab]. */
  async logits() {
    const size = 4 * this.facts.batch * this.facts.vocab_size;
    return new Float32Array(await this.#read(this.last.logits, size));
  }

  async #read(buffer, size) {
    const { COPY_DST, MAP_READ } = GPUBufferUsage;
    this.staging ??= new Map();
    if (!this.staging.has(size)) this.staging.set(size, this.device.createBuffer({ size, usage: COPY_DST | MAP_READ }));
    const staging = this.staging.get(size);
    const encoder = this.device.createCommandEncoder();
    encoder.copyBufferToBuffer(buffer, 0, staging, 0, size);
    this.device.queue.submit([encoder.finish()]);
    await staging.mapAsync(GPUMapMode.READ);
    const data = staging.getMappedRange().slice(0);
    staging.unmap();
    if (this.device.failure) throw new PlanError(this.device.failure);
    return data;
  }

  /** The steps of a prompt, int32 tokens of one sequence, which every sequence of the batch gets. */
  prompt(tokens, position) {
    const { batch, chunks, context, chunk_ns } = this.facts;
    let done = 0;
    return splitPrompt(tokens.length, position, chunks, context, chunk_ns).map(({ chunk, valid }) => {
      const part = new Int32Array(chunk);
      part.set(tokens.slice(done, done + valid));
      const step = { length: chunk, tokens: this.#everySequence(part, batch), position: position + done, lastToken: valid - 1 };
      done += valid;
      return step;
    });
  }

  /** The step of one generated token. */
  decode(token, position) {
    return { length: 1, tokens: this.#everySequence([token], this.facts.batch), position, lastToken: 0 };
  }

  #everySequence(tokens, batch) {
    return Int32Array.from({ length: batch * tokens.length }, (_, i) => tokens[i % tokens.length]);
  }

  /** Run steps: milliseconds by the wall clock, and by the device's own where it has one. */
  async measure(steps) {
    await this.wait();
    const { timer } = this;
    const start = performance.now();
    steps.forEach((step, i) => this.run(step, timer?.writes(i === 0, i === steps.length - 1)));
    await this.wait();
    const wallMs = performance.now() - start;
    return { wallMs, deviceMs: timer ? await timer.elapsedMs() : null };
  }

  /** Timestamps before the first and after the last of several passes. */
  #timer() {
    const { QUERY_RESOLVE, COPY_SRC } = GPUBufferUsage;
    const querySet = this.device.createQuerySet({ type: "timestamp", count: 2 });
    const buffer = this.device.createBuffer({ size: 16, usage: QUERY_RESOLVE | COPY_SRC });
    return {
      writes: (first, last) =>
        first || last
          ? {
              querySet,
              ...(first ? { beginningOfPassWriteIndex: 0 } : {}),
              ...(last ? { endOfPassWriteIndex: 1 } : {}),
            }
          : undefined,
      elapsedMs: async () => {
        const encoder = this.device.createCommandEncoder();
        encoder.resolveQuerySet(querySet, 0, 2, buffer, 0);
        this.device.queue.submit([encoder.finish()]);
        const [begin, end] = new BigUint64Array(await this.#read(buffer, 16));
        return Number(end - begin) / 1e6;
      },
    };
  }
}
