/**
 * The connection to the server: it sends messages, reads those of the server (see protocol.py),
 * and takes up a lost connection again by itself.
 */

const VERSION = 1;
/** Waits before each new try: within the 30 s for which the server keeps a lost session. */
const RETRIES_MS = [500, 1000, 2000, 4000, 8000, 12000];
/** Where this tab keeps its session, so that a reload takes it up again. */
const KEPT = "drivesim-session";
/** Code with which a server closes its sockets when it stops. */
const STOPPED = 1012;
const PING_MS = 5000;
/** A connection that leaves a ping unanswered for so long is dead, though nobody closed it. */
const SILENCE_MS = 20000;

/**
 * @typedef {"connecting" | "open" | "lost" | "busy" | "ended"} Link
 * @typedef {object} Listener
 * @property {(link: Link, text: string) => void} link the connection changed; why, in words
 * @property {(message: any) => void} message a JSON message, or the header of a binary one
 */

export class Connection {
  /** @type {WebSocket | null} */ #socket = null;
  #session = keptSession();
  /** @type {Link} */ #link = "connecting";
  #tries = 0;
  #retry = 0;
  /** Time of the first ping since something arrived. @type {number | null} */ #asked_ms = null;
  #listener;

  /** @param {Listener} listener */
  constructor(listener) {
    this.#listener = listener;
    setInterval(() => this.#checkAlive(), PING_MS);
    window.addEventListener("online", () => this.#link === "lost" && this.open());
  }

  get isOpen() {
    return this.#link === "open";
  }

  /** Connect now. A session from before a loss is taken up again; one that ended is not. */
  open() {
    clearTimeout(this.#retry);
    this.#drop();
    if (this.#link === "lost") this.#tell("lost", "Connecting again");
    else this.#tell("connecting", "Connecting");
    const socket = new WebSocket(address());
    socket.binaryType = "arraybuffer";
    socket.onopen = () => this.#write({ type: "hello", version: VERSION, session: this.#session });
    socket.onmessage = (event) => this.#read(event.data);
    socket.onclose = ({ code }) => {
      if (code === STOPPED) this.#farewell("ended", "The server has stopped. Recordings are kept.");
      else this.#closed();
    };
    this.#socket = socket;
    // Some networks swallow the packets of a connection that is being made.
    this.#asked_ms = performance.now();
  }

  /**
   * Send a message, unless there is no session to take it. Returns whether it was sent.
   * @param {{type: string}} message
   */
  send(message) {
    return this.isOpen && this.#write(message);
  }

  #write(message) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return false;
    this.#socket.send(JSON.stringify(message));
    return true;
  }

  /** @param {string | ArrayBuffer} data */
  #read(data) {
    this.#asked_ms = null;
    const message = typeof data === "string" ? JSON.parse(data) : unpack(data);
    if (message.type === "welcome") this.#welcomed(message);
    else if (message.type === "busy") this.#farewell("busy", message.text);
    else if (message.type === "end") this.#farewell("ended", message.text);
    if (message.type !== "pong") this.#listener.message(message);
  }

  #welcomed(message) {
    const isAnother = this.#session !== null && this.#session !== message.session;
    this.#remember(message.session);
    this.#tries = 0;
    this.#tell("open", "");
    if (isAnother) {
      const text = "The earlier drive was lost too long ago. This is a new one.";
      this.#listener.message({ type: "notice", text });
    }
  }

  /** The server says why it closes, so there is nothing to take up again. */
  #farewell(link, text) {
    this.#remember(null);
    this.#tries = 0;
    this.#drop();
    this.#tell(link, text);
  }

  #closed() {
    this.#socket = this.#asked_ms = null;
    const wait_ms = RETRIES_MS[this.#tries];
    if (wait_ms === undefined) {
      this.#tries = 0;
      this.#tell("lost", "No connection to the server. Is `drivesim play` still running?");
      return;
    }
    this.#tries += 1;
    this.#retry = setTimeout(() => this.open(), wait_ms);
    const seconds = wait_ms < 1000 ? "a moment" : `${wait_ms / 1000} s`;
    this.#tell("lost", `No connection to the server. Next try in ${seconds}.`);
  }

  /** Close the socket and hear no more of it. */
  #drop() {
    const socket = this.#socket;
    if (!socket) return;
    this.#socket = null;
    socket.onopen = socket.onmessage = socket.onclose = null;
    socket.close();
  }

  #checkAlive() {
    const now_ms = performance.now();
    if (this.#asked_ms !== null && now_ms - this.#asked_ms > SILENCE_MS) {
      this.#drop();
      this.#closed();
    } else if (this.send({ type: "ping", stamp: now_ms })) {
      this.#asked_ms ??= now_ms;
    }
  }

  /** @param {string | null} session */
  #remember(session) {
    this.#session = session;
    try {
      if (session) sessionStorage.setItem(KEPT, session);
      else sessionStorage.removeItem(KEPT);
    } catch {
      // Without storage, a reload begins a new session.
    }
  }

  #tell(link, text) {
    this.#link = link;
    this.#listener.link(link, text);
  }
}

function keptSession() {
  try {
    return sessionStorage.getItem(KEPT);
  } catch {
    return null;
  }
}

function address() {
  const url = new URL("drive", location.href);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  url.search = location.search;
  return url;
}

/**
 * Read a binary message: header length (uint32, little endian), header, and parts.
 * @param {ArrayBuffer} buffer
 */
function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let at = 4 + length;
  header.parts = header.parts.map((bytes) => {
    const part = new Uint8Array(buffer, at, bytes);
    at += bytes;
    return part;
  });
  return header;
}
