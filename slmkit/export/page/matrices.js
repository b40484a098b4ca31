// One memory for weights, activations and the cache, and products of matrices in it: in WebAssembly, or in JavaScript
// where a browser has no SIMD or forbids it. Columns are padded with zeros to a multiple of 32.
"use strict";

const PAGE = 65536;
const GROUP = 32; // weights with one scale
const KINDS = ["f32", "f16", "int8", "int4"];
const BITS = { f32: 32, f16: 16, int8: 8, int4: 4 };

const padded = (size, multiple = GROUP) => Math.ceil(size / multiple) * multiple;

/** Bytes of a matrix's codes and of its scales. */
function matrixBytes({ kind, rows, columns }) {
  const codes = (rows * padded(columns) * BITS[kind]) / 8;
  return { codes, scales: kind.startsWith("int") ? (rows * padded(columns) * 2) / GROUP : 0 };
}

class Memory {
  /** `bytes`: size of all that will ever be allocated. It is not used before it is written. */
  constructor(bytes, kernels) {
    this.next = 1024;
    const pages = Math.ceil((bytes + this.next) / PAGE) + 1;
    this.kernels = null;
    if (kernels) {
      try {
        const memory = new WebAssembly.Memory({ initial: pages, maximum: pages });
        this.kernels = new WebAssembly.Instance(new WebAssembly.Module(kernels), { env: { memory } }).exports;
        this.buffer = memory.buffer;
      } catch (error) {
        console.info(`without WebAssembly: ${error.message}`);
      }
    }
    this.buffer ??= new ArrayBuffer(pages * PAGE);
  }

  /** The address of new bytes, all 0. */
  allocate(bytes) {
    const at = this.next;
    this.next += padded(bytes, 64);
    if (this.next > this.buffer.byteLength) throw new Error("the memory was planned too small");
    return at;
  }

  /** New floats, all 0. */
  floats(count) {
    return new Float32Array(this.buffer, this.allocate(count * 4), count);
  }
}

/** A matrix [rows, columns] whose codes and scales lie in the memory. */
class Matrix {
  constructor(memory, { kind, rows, columns }, codes, scales) {
    Object.assign(this, { memory, kind: KINDS.indexOf(kind), rows, columns, codes, scales });
    this.padded = padded(columns);
    this.rowBytes = (this.padded * BITS[kind]) / 8;
    this.values = kind === "f32" ? new Float32Array(memory.buffer, codes, rows * this.padded)
      : kind === "f16" ? new Uint16Array(memory.buffer, codes, rows * this.padded)
      : new Uint8Array(memory.buffer, codes, rows * this.rowBytes);
    if (scales) this.scale = new Uint16Array(memory.buffer, scales, (rows * this.padded) / GROUP);
  }

  /** Row `row` as floats, into `out` [padded columns]. */
  unpack(row, out) {
    if (this.kind && this.memory.kernels) {
      const scales = this.scales + (row * this.padded) / 16;
      this.memory.kernels.unpack(this.kind, this.codes + row * this.rowBytes, scales, out.byteOffset, this.padded);
    } else UNPACK[this.kind](this, row, out);
  }

  /** y[t, row] = Σ w[row, i] x[t, i]. Strides are in floats; `scratch` holds a row of floats. */
  multiply(x, xStride, y, yStride, positions, scratch) {
    const { kernels } = this.memory;
    if (kernels) {
      kernels.multiply(
        this.kind, this.codes, this.scales, this.rows, this.padded, this.rowBytes,
        x.byteOffset, xStride * 4, y.byteOffset, yStride * 4, positions, scratch.byteOffset,
      );
      return;
    }
    for (let row = 0; row < this.rows; row++) {
      this.unpack(row, scratch);
      for (let t = 0; t < positions; t++) y[t * yStride + row] = dot(scratch, 0, x, t * xStride, this.columns);
    }
  }
}

function dot(a, i, b, j, count) {
  let sum = 0;
  for (let k = 0; k < count; k++) sum += a[i + k] * b[j + k];
  return sum;
}

const half = new Float32Array(1);
const halfBits = new Uint32Array(half.buffer);

/** The float of which these are the high 16 bits. */
function bfloat16(bits) {
  halfBits[0] = bits << 16;
  return half[0];
}

function float16(bits) {
  halfBits[0] = (bits & 0x7fff) << 13;
  const size = half[0] * 2 ** 112;
  return bits & 0x8000 ? -size : size;
}

// By kind: row `row` of a matrix as floats, in JavaScript.
const UNPACK = [
  (m, row, out) => out.set(m.values.subarray(row * m.padded, (row + 1) * m.padded)),
  (m, row, out) => {
    for (let i = 0; i < m.padded; i++) out[i] = float16(m.values[row * m.padded + i]);
  },
  (m, row, out) => {
    for (let i = 0; i < m.padded; i++) {
      const at = row * m.padded + i;
      out[i] = bfloat16(m.scale[(at / GROUP) | 0]) * ((m.values[at] << 24) >> 24);
    }
  },
  (m, row, out) => {
    for (let i = 0; i < m.padded; i++) {
      const place = i % GROUP;
      const byte = m.values[(row * m.padded + i - place) / 2 + (place % 16)];
      const scale = bfloat16(m.scale[((row * m.padded + i) / GROUP) | 0]);
      out[i] = scale * ((place < 16 ? byte & 15 : byte >> 4) - 8);
    }
  },
];

/** y[i] = Σ_j p[j] rows[start + j, i], of rows of `columns` floats. */
function mix(memory, p, rows, start, y, count, columns) {
  if (memory.kernels) {
    memory.kernels.mix(p.byteOffset, rows.byteOffset + start * columns * 4, y.byteOffset, count, columns);
    return;
  }
  y.fill(0, 0, columns);
  for (let j = 0; j < count; j++) {
    const at = (start + j) * columns;
    for (let i = 0; i < columns; i++) y[i] += p[j] * rows[at + i];
  }
}

/** y[j] = rows[start + j] · x, of rows of `columns` floats. */
function scores(memory, rows, start, x, y, count, columns) {
  if (memory.kernels) {
    const at = rows.byteOffset + start * columns * 4;
    memory.kernels.multiply(0, at, 0, count, columns, columns * 4, x.byteOffset, 0, y.byteOffset, 0, 1, 0);
    return;
  }
  for (let j = 0; j < count; j++) y[j] = dot(rows, (start + j) * columns, x, 0, columns);
}
