// One WebGPU device of Dawn, driven by tunebench/apis/dawn.py through a socket. A message is two little-endian uint32, the
// lengths of a JSON array [name, ...arguments] and of the bytes behind it. A question is answered likewise, by
// {value} or {error} and bytes; everything else is answered only where a later question finds that it failed.

import { connect } from "node:net";
import { pathToFileURL } from "node:url";

const [, , packages, options, port, token] = process.argv;
const { create, globals } = await import(pathToFileURL(`${packages}/index.js`));
Object.assign(globalThis, globals);

const MOST_BLOCKS = 65535; // along one axis of a grid
const WANTED = ["shader-f16", "subgroups", "timestamp-query", "chromium-experimental-subgroup-matrix"];
const RUNS_A_TURN = 8; // after which Dawn gets to free what is done
const { STORAGE, COPY_DST, COPY_SRC, MAP_READ, QUERY_RESOLVE, UNIFORM } = GPUBufferUsage;

let gpu, adapter, device, timer, failure = null, runs = 0;
const buffers = new Map(), kernels = new Map(), recordings = new Map();
const layouts = new Map(), uniforms = new Map(), staging = new Map();
const padded = (bytes) => Math.ceil(bytes / 4) * 4;

function layout(writes) {
  const key = writes.map(Number).join("");
  if (!layouts.has(key)) {
    const kinds = [...writes.map((written) => (written ? "storage" : "read-only-storage")), "uniform"];
    const entries = kinds.map((type, binding) => ({ binding, visibility: GPUShaderStage.COMPUTE, buffer: { type } }));
    const group = device.createBindGroupLayout({ entries });
    layouts.set(key, { group, pipeline: device.createPipelineLayout({ bindGroupLayouts: [group] }) });
  }
  return layouts.get(key);
}

// In which TVM's shaders find the last block along x.
function uniform(value) {
  if (!uniforms.has(value)) {
    const buffer = device.createBuffer({ size: 16, usage: UNIFORM | COPY_DST });
    device.queue.writeBuffer(buffer, 0, new Uint32Array([value, 0, 0, 0]));
    uniforms.set(value, buffer);
  }
  return uniforms.get(value);
}

// Blocks along x beyond what a grid may have, along z, where TVM's shaders look for them.
function spread([x, y, z]) {
  while (x > MOST_BLOCKS) [x, z] = [Math.ceil(x / 2), z * 2];
  return [x, y, z];
}

function encode(encoder, { calls, times }, timestampWrites) {
  const pass = encoder.beginComputePass(timestampWrites ? { timestampWrites } : {});
  let current = null;
  for (let i = 0; i < times; ++i)
    for (const [pipeline, group, x, y, z] of calls) {
      if (pipeline !== current) pass.setPipeline((current = pipeline));
      pass.setBindGroup(0, group);
      pass.dispatchWorkgroups(x, y, z);
    }
  pass.end();
}

async function read(buffer, size) {
  if (!staging.has(size)) staging.set(size, device.createBuffer({ size: padded(size), usage: COPY_DST | MAP_READ }));
  const held = staging.get(size);
  const encoder = device.createCommandEncoder();
  encoder.copyBufferToBuffer(buffer, 0, held, 0, padded(size));
  device.queue.submit([encoder.finish()]);
  await held.mapAsync(GPUMapMode.READ);
  const found = new Uint8Array(held.getMappedRange().slice(0, size));
  held.unmap();
  return found;
}

const does = {
  allocate(id, size) {
    buffers.set(id, device.createBuffer({ size: padded(size), usage: STORAGE | COPY_DST | COPY_SRC }));
  },
  write(id, offset, data) {
    device.queue.writeBuffer(buffers.get(id), offset, data);
  },
  copy(to, source, size) {
    const encoder = device.createCommandEncoder();
    encoder.copyBufferToBuffer(buffers.get(source), 0, buffers.get(to), 0, padded(size));
    device.queue.submit([encoder.finish()]);
  },
  record(id, calls, times) {
    const made = calls.map(([kernel, bound, blocks]) => {
      const { pipeline, group } = kernels.get(kernel);
      const resources = [...bound.map((each) => buffers.get(each)), uniform(blocks[0] - 1)];
      const entries = resources.map((buffer, binding) => ({ binding, resource: { buffer } }));
      return [pipeline, device.createBindGroup({ layout: group, entries }), ...spread(blocks)];
    });
    recordings.set(id, { calls: made, times });
  },
  async run(id) {
    const encoder = device.createCommandEncoder();
    encode(encoder, recordings.get(id));
    device.queue.submit([encoder.finish()]);
    if (++runs % RUNS_A_TURN === 0) await new Promise(setImmediate);
  },
  free(ids) {
    for (const id of ids) {
      buffers.get(id)?.destroy();
      for (const held of [buffers, kernels, recordings]) held.delete(id);
    }
  },
};

const answers = {
  async open() {
    gpu = create(JSON.parse(options)); // Dawn ends with it
    adapter = await gpu.requestAdapter({ powerPreference: "high-performance" });
    if (!adapter) throw new Error("no adapter");
    device = await adapter.requestDevice({
      requiredFeatures: WANTED.filter((name) => adapter.features.has(name)),
      requiredLimits: Object.fromEntries(Object.entries(limitsOf(adapter)).filter(([, value]) => value)),
    });
    device.addEventListener("uncapturederror", ({ error }) => (failure ??= error.message));
    device.lost.then(({ message, reason }) => (failure ??= `the device was lost (${reason}): ${message}`));
    if (device.features.has("timestamp-query"))
      timer = {
        querySet: device.createQuerySet({ type: "timestamp", count: 2 }),
        buffer: device.createBuffer({ size: 16, usage: QUERY_RESOLVE | COPY_SRC }),
      };
    const { vendor, architecture, device: name, description, subgroupMinSize, subgroupMaxSize } = adapter.info;
    const matrices = [...(adapter.info.subgroupMatrixConfigs ?? [])].map((each) => ({
      in: each.componentType,
      out: each.resultComponentType ?? each.resultType,
      shape: [each.M, each.N, each.K],
    }));
    const features = [...device.features].filter((each) => WANTED.includes(each)).sort();
    const facts = { vendor, architecture, name, description, subgroupMinSize, subgroupMaxSize, matrices, features };
    return [{ ...facts, limits: limitsOf(adapter) }];
  },
  async compile(id, source, entry, writes) {
    device.pushErrorScope("validation"); // of which the compiler's own words say more
    const module = device.createShaderModule({ code: source });
    await device.popErrorScope();
    const { messages } = await module.getCompilationInfo(); // of a wrong one, no pipeline ever comes
    const wrong = messages.find(({ type }) => type === "error");
    if (wrong) throw new Error(`line ${wrong.lineNum}: ${wrong.message}`);
    const { group, pipeline } = layout(writes);
    const compute = { module, entryPoint: entry };
    kernels.set(id, { pipeline: await device.createComputePipelineAsync({ layout: pipeline, compute }), group });
    return [null];
  },
  async read(id, size) {
    return [null, await read(buffers.get(id), size)];
  },
  async held() {
    return [buffers.size];
  },
  async wait() {
    await device.queue.onSubmittedWorkDone();
    return [null];
  },
  async elapsed(id) {
    if (!timer) throw new Error("this adapter has no timestamps");
    const { querySet, buffer } = timer;
    const encoder = device.createCommandEncoder();
    encode(encoder, recordings.get(id), { querySet, beginningOfPassWriteIndex: 0, endOfPassWriteIndex: 1 });
    encoder.resolveQuerySet(querySet, 0, 2, buffer, 0);
    device.queue.submit([encoder.finish()]);
    const [begin, end] = new BigUint64Array((await read(buffer, 16)).buffer);
    return [Number(end - begin)];
  },
};

function limitsOf(adapter) {
  const limits = {};
  for (const name in adapter.limits) if (typeof adapter.limits[name] === "number") limits[name] = adapter.limits[name];
  return limits;
}

async function take(size) {
  const parts = [left];
  let held = left.length;
  for (; held < size; held += parts.at(-1).length) {
    const { value, done } = await chunks.next();
    if (done) process.exit(0);
    parts.push(value);
  }
  const all = Buffer.concat(parts, held);
  left = all.subarray(size);
  return all.subarray(0, size);
}

function give(answer, data = new Uint8Array()) {
  const words = Buffer.from(JSON.stringify(answer));
  const head = Buffer.alloc(8);
  head.writeUInt32LE(words.length, 0);
  head.writeUInt32LE(data.length, 4);
  socket.write(Buffer.concat([head, words, data]));
}

const socket = connect(Number(port), "127.0.0.1").setNoDelay(true);
const chunks = socket[Symbol.asyncIterator]();
let left = Buffer.alloc(0);
socket.write(token);
for (;;) {
  const head = await take(8);
  const [name, ...given] = JSON.parse((await take(head.readUInt32LE(0))).toString());
  const data = await take(head.readUInt32LE(4));
  try {
    if (does[name]) {
      await does[name](...given, data);
      continue;
    }
    const [value, found] = await answers[name](...given);
    give(failure ? { error: failure } : { value }, found);
  } catch (error) {
    if (does[name]) failure ??= error.message;
    else give({ error: failure ?? error.message });
  }
}
