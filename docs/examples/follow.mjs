// Reads the stream as one of a consumer group until nothing is left, with no package at all:
//   node follow.mjs 127.0.0.1 6379 [PASSWORD]
import net from "node:net";

const [host, port, password] = process.argv.slice(2);
const socket = net.connect(Number(port), host);
const chunks = socket[Symbol.asyncIterator]();
let buffer = Buffer.alloc(0);

async function take(end) { // end(): where what is wanted ends in the buffer, -1 while it is not all there
  while (end() < 0) {
    const { value, done } = await chunks.next();
    if (done) throw new Error("the server went away");
    buffer = Buffer.concat([buffer, value]);
  }
  const size = end();
  const text = buffer.toString("utf8", 0, size);
  buffer = buffer.subarray(size + 2);
  return text;
}

async function reply() {
  const head = await take(() => buffer.indexOf("\r\n"));
  const rest = head.slice(1);
  switch (head[0]) {
    case "-": throw new Error(rest);
    case ":": return Number(rest);
    case "$": return rest === "-1" ? null : take(() => (buffer.length < Number(rest) + 2 ? -1 : Number(rest)));
    case "*": {
      const items = [];
      while (items.length < Number(rest)) items.push(await reply());
      return rest === "-1" ? null : items;
    }
    default: return rest;
  }
}

function call(...parts) {
  socket.write(`*${parts.length}\r\n` + parts.map((p) => `$${Buffer.byteLength(p)}\r\n${p}\r\n`).join(""));
  return reply();
}

if (password) await call("AUTH", password);
await call("XGROUP", "CREATE", "balances", "dashboard", "0", "MKSTREAM").catch((error) => {
  if (!error.message.startsWith("BUSYGROUP")) throw error;
});
const read = (after) => call("XREADGROUP", "GROUP", "dashboard", "node-1", "COUNT", "100", "STREAMS", "balances", after);
for (const after of ["0", ">"]) { // first what this consumer was given before and did not finish
  let found;
  while ((found = (await read(after))?.[0][1])?.length) {
    for (const [entry, pairs] of found) {
      if (pairs) show(pairs); // none: the stream forgot it meanwhile
      await call("XACK", "balances", "dashboard", entry);
    }
  }
}
socket.end();

function show(pairs) {
  const event = {};
  for (let i = 0; i < pairs.length; i += 2) event[pairs[i]] = pairs[i + 1];
  if (event.type !== "balance.observed.v1") return console.log(event.subject, event.type);
  for (const b of JSON.parse(event.data).balances) {
    console.log(event.subject, b.type, b.indicator, b.amount, b.currency); // the amount is a string: keep it one
  }
}
