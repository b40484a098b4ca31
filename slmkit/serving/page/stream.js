// An answer of the OpenAI API as it is written: server-sent events over `fetch`.

/**
 * Server-sent events from chunks of bytes, which may be split anywhere: inside a character, a line's end, a field.
 * https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
 */
export class EventParser {
  #decoder = new TextDecoder();
  #line = "";
  #data = [];
  #afterReturn = false; // a "\n" that follows belongs to the "\r" before it

  /** The data of the events that became complete. */
  push(bytes) {
    let text = this.#decoder.decode(bytes, { stream: true });
    if (!text) return [];
    if (this.#afterReturn && text.startsWith("\n")) text = text.slice(1);
    this.#afterReturn = text.endsWith("\r");
    const lines = (this.#line + text).split(/\r\n|\n|\r/);
    this.#line = lines.pop();
    const events = [];
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line === "data" || line.startsWith("data:")) {
        this.#data.push(line.slice(5).replace(/^ /, ""));
      } // other fields and comments mean nothing here
    }
    return events;
  }
}

/**
 * POST `body` to `path`; yields {text, finish, usage} as they come, each of them possibly absent.
 * Throws an Error with the server's message; with `name` "AbortError" if `signal` was aborted.
 */
export async function* answer(app, path, body, signal) {
  const response = await app.api(path, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw new Error(await app.messageOf(response));
  const parser = new EventParser();
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("The connection ended before the answer did.");
      for (const data of parser.push(value)) {
        if (data === "[DONE]") return;
        const { choices, usage, error } = JSON.parse(data);
        if (error) throw new Error(error.message);
        const choice = choices?.[0];
        yield { text: choice?.delta?.content ?? choice?.text ?? "", finish: choice?.finish_reason, usage };
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // of a connection that is closed already
  }
}
