// Assembles the WebAssembly text format, as far as kernels.wat uses it: functions of folded instructions.
"use strict";

const TYPES = { i32: 0x7f, f32: 0x7d, v128: 0x7b };
const EMPTY_BLOCK = 0x40;
const END = 0x0b;
const INSTRUCTIONS = {
  "call": [0x10], "br_if": [0x0d], "local.get": [0x20], "local.set": [0x21],
  "i32.const": [0x41], "f32.const": [0x43],
  "i32.load16_u": [0x2f], "f32.store": [0x38],
  "i32.eq": [0x46], "i32.lt_u": [0x49], "i32.add": [0x6a], "i32.sub": [0x6b], "i32.shl": [0x74], "i32.shr_u": [0x76],
  "f32.add": [0x92], "f32.reinterpret_i32": [0xbe],
  "v128.load": [0xfd, 0x00], "v128.load16x4_u": [0xfd, 0x04], "v128.load32_splat": [0xfd, 0x09], "v128.store": [0xfd, 0x0b],
  "i8x16.splat": [0xfd, 0x0f], "i32x4.splat": [0xfd, 0x11], "f32x4.splat": [0xfd, 0x13], "f32x4.extract_lane": [0xfd, 0x1f],
  "v128.and": [0xfd, 0x4e], "v128.or": [0xfd, 0x50], "i8x16.shr_u": [0xfd, 0x6d], "i8x16.sub": [0xfd, 0x71],
  "i16x8.extend_low_i8x16_s": [0xfd, 0x87, 0x01], "i16x8.extend_high_i8x16_s": [0xfd, 0x88, 0x01],
  "i32x4.extend_low_i16x8_s": [0xfd, 0xa7, 0x01], "i32x4.extend_high_i16x8_s": [0xfd, 0xa8, 0x01],
  "i32x4.shl": [0xfd, 0xab, 0x01], "f32x4.convert_i32x4_s": [0xfd, 0xfa, 0x01],
  "f32x4.add": [0xfd, 0xe4, 0x01], "f32x4.mul": [0xfd, 0xe6, 0x01],
};

/** Whole numbers in LEB128, signed: seven bits a byte, the last byte without the high bit. */
function leb(value) {
  const bytes = [];
  for (;;) {
    const byte = value & 0x7f;
    value >>= 7;
    if ((value === 0 && !(byte & 0x40)) || (value === -1 && byte & 0x40)) return [...bytes, byte];
    bytes.push(byte | 0x80);
  }
}

/** The same, unsigned. */
function uleb(value) {
  return value < 0x80 ? [value] : [(value & 0x7f) | 0x80, ...uleb(value >>> 7)];
}

/** Nested lists of the words of a text in parentheses. */
function parsed(text) {
  const root = [];
  const open = [root];
  for (const word of text.replace(/;;.*/g, "").match(/[()]|[^\s()]+/g)) {
    if (word === ")") open.pop();
    else {
      const part = word === "(" ? [] : word;
      open.at(-1).push(part);
      if (word === "(") open.push(part);
    }
  }
  return root;
}

/** The bytes of one function's code. `functions`: names in order. */
function functionCode(list, functions) {
  const named = (head) => list.filter((part) => part[0] === head).map(([, name, type]) => [name, type]);
  const locals = [...named("param"), ...named("local")].map(([name]) => name);
  const labels = [];

  function immediate(head, word) {
    if (head === "i32.const") return leb(Number(word) | 0);
    if (head === "f32.const") return [...new Uint8Array(new Float32Array([Number(word)]).buffer)];
    if (head === "br_if") return uleb(labels.length - 1 - labels.lastIndexOf(word));
    if (head === "call") return uleb(functions.indexOf(word));
    if (head.startsWith("local.")) return uleb(locals.indexOf(word));
    if (word.startsWith("offset=")) return [0, ...uleb(Number(word.slice(7)))]; // any alignment
    return uleb(Number(word)); // a lane
  }
  function code([head, ...rest]) {
    if (head === "loop" || head === "if") {
      const [first, ...others] = rest;
      labels.push(head === "loop" ? first : null);
      const body = (head === "loop" ? others : rest[1].slice(1)).flatMap(code);
      labels.pop();
      return head === "loop" ? [0x03, EMPTY_BLOCK, ...body, END] : [...code(first), 0x04, EMPTY_BLOCK, ...body, END];
    }
    if (!INSTRUCTIONS[head]) throw new Error(`no instruction ${head}`);
    const operands = rest.filter(Array.isArray).flatMap(code);
    return [...operands, ...INSTRUCTIONS[head], ...rest.filter((word) => !Array.isArray(word)).flatMap((word) => immediate(head, word))];
  }
  const body = list.filter((part) => Array.isArray(part) && !["param", "local", "result"].includes(part[0])).flatMap(code);
  const declared = named("local").flatMap(([, type]) => [1, TYPES[type]]);
  const content = [...uleb(named("local").length), ...declared, ...body, END];
  return [...uleb(content.length), ...content];
}

/** A module of these functions, all exported, that imports `env.memory`. Text → bytes. */
function assembled(text) {
  const list = parsed(text);
  const names = list.map(([, name]) => name);
  const types = list.map((one) => {
    const of = (head) => one.filter((part) => part[0] === head).map((part) => TYPES[part.at(-1)]);
    return [0x60, ...uleb(of("param").length), ...of("param"), ...uleb(of("result").length), ...of("result")];
  });
  const word = (name) => [name.length, ...new TextEncoder().encode(name)];
  const vector = (parts) => [...uleb(parts.length), ...parts.flat()];
  const sections = [
    [1, vector(types)],
    [2, vector([[...word("env"), ...word("memory"), 2, 0, 1]])],
    [3, vector(names.map((_, index) => uleb(index)))],
    [7, vector(names.map((name, index) => [...word(name.slice(1)), 0, ...uleb(index)]))],
    [10, vector(list.map((one) => functionCode(one, names)))],
  ];
  const bytes = sections.flatMap(([id, content]) => [id, ...uleb(content.length), ...content]);
  return new Uint8Array([0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, ...bytes]);
}
