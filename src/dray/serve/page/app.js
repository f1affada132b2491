// Asks a service of dray's what it serves, and lets a person try it: chat, completion, or predictions
// of records, of one model or of two beside each other. It keeps the key for this tab alone, and writes
// what models say as text, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const CHAT = "chat", WRITE = "completions", EXTRACT = "extract", PREDICT = "predict";
const WAYS = [CHAT, WRITE, EXTRACT, PREDICT];
const PATHS = { [CHAT]: "v1/chat/completions", [WRITE]: "v1/completions", [EXTRACT]: "extract", [PREDICT]: "predict" };
const TITLES = {
  [CHAT]: "Say something", [WRITE]: "Begin a text", [EXTRACT]: "Find names in a text", [PREDICT]: "Ask about a record",
};
let served = [];
let talk = { model: [], beside: [] };
let asking = null;

function make(tag, text = "", attributes = {}) {
  const found = document.createElement(tag);
  found.textContent = text;
  for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
  return found;
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function ask(path, body, signal) {
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  const answer = await fetch(path, { ...options, headers: headers(), signal });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw new Error(told.error?.message ?? `${answer.status} ${answer.statusText}`);
}

function way(model) {
  return WAYS.find((route) => model?.routes.includes(route));
}

async function look() {
  const before = $("model").value;
  try {
    served = (await (await ask("v1/models")).json()).data.flatMap(withVersions);
  } catch (error) {
    $("ask").hidden = true;
    $("told").textContent = `${error.message}. A service that asks for keys wants one above.`;
    return;
  }
  const names = served.map((model) => model.id);
  const options = () => served.map(({ id, role }) => new Option(role ? `${id} (${role})` : id, id));
  $("model").replaceChildren(...options());
  $("beside").replaceChildren(new Option("nothing", ""), ...options());
  if (names.includes(before)) $("model").value = before;
  show();
}

// A model, and its versions by name where there are several.
function withVersions(model) {
  const some = model.versions.length > 1 ? model.versions : [];
  return [model, ...some.map(({ version, role }) => ({ ...model, id: `${model.id}@${version}`, role }))];
}

function chosen(id) {
  return served.find((model) => model.id === $(id).value);
}

function field(name) {
  const label = make("label", name);
  label.append(make("textarea", "", { name, required: "" }));
  return label;
}

function show() {
  const model = chosen("model"), by = way(model);
  talk = { model: [], beside: [] };
  $("answers").replaceChildren();
  $("ask").hidden = !by;
  $("told").textContent = by ? "" : "This model is for other programs: it has nothing to be tried here.";
  if (!by) return;
  $("what").textContent = TITLES[by];
  $("settings").hidden = by !== CHAT && by !== WRITE;
  const fields = by === PREDICT ? model.fields : ["text"];
  $("fields").replaceChildren(...fields.map(field));
}

function settings() {
  const read = (name) => $("ask").elements[name].value;
  const found = { max_tokens: Number(read("max_tokens")), temperature: Number(read("temperature")) };
  return read("seed") === "" ? found : { ...found, seed: Number(read("seed")) };
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    kept += value;
    const lines = kept.split("\n");
    kept = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function write(place, name, text, out, signal) {
  const by = way(chosen(place));
  const said = talk[place];
  let body = { model: name, stream: true, ...settings() };
  if (by === CHAT) {
    said.push({ role: "user", content: text });
    out.append(make("pre", text, { class: "user" }));
    body = { ...body, messages: said };
  } else body = { ...body, prompt: text };
  const told = make("pre");
  out.append(told);
  const started = performance.now();
  let pieces = 0;
  const answer = await ask(PATHS[by], body, signal);
  for await (const event of events(answer)) {
    const choice = event.choices[0];
    const piece = by === CHAT ? choice?.delta?.content : choice?.text;
    if (piece) { told.textContent += piece; pieces += 1; }
  }
  if (by === CHAT) said.push({ role: "assistant", content: told.textContent });
  const seconds = (performance.now() - started) / 1000;
  out.append(make("p", `${seconds.toFixed(1)} s, ${pieces} pieces`, { class: "hint" }));
  out.append(...judging(chosen(place), answer, make("textarea", "", { "aria-label": "what it should have said", rows: 2 }), "text"));
}

// Buttons by which somebody says of an answer that it was right, that it was not, or what would have been.
function judging(model, answer, field, named) {
  const id = answer.headers.get("x-request-id");
  if (!model?.feedback || !id) return [];
  const row = make("p", "", { class: "buttons judging" }), told = make("span", "", { role: "status", class: "said" });
  const say = async (said) => {
    try {
      await ask("v1/feedback", { id, ...said });
      row.replaceChildren(told);
      told.textContent = "Thank you: this is kept.";
    } catch (error) {
      told.textContent = error.message;
    }
  };
  const button = (text, name, made) => {
    const found = make("button", text, { type: "button", "aria-label": name });
    found.addEventListener("click", () => { const said = made(); if (said) say(said); });
    row.append(found);
  };
  button("👍", "right", () => ({ rating: "up" }));
  button("👎", "wrong", () => ({ rating: "down" }));
  if (field) {
    row.append(field);
    button("It should be this", "correct it", () => field.value && { rating: "down", [named]: field.value });
  }
  row.append(told);
  return [row];
}

function scores(found) {
  const table = make("table");
  table.append(make("caption", "How likely each is"));
  for (const [label, value] of Object.entries(found).sort((a, b) => b[1] - a[1]).slice(0, 10)) {
    const row = make("tr"), cell = make("td");
    cell.append(make("meter", "", { value, min: 0, max: 1, "aria-label": label }), ` ${value.toFixed(3)}`);
    row.append(make("th", label, { scope: "row" }), cell);
    table.append(row);
  }
  return table;
}

function tagged(words, tags) {
  const told = make("p");
  words.forEach((word, place) => {
    const isNamed = tags[place] && tags[place] !== "O";
    const piece = make(isNamed ? "mark" : "span", word);
    if (isNamed) piece.append(make("sub", tags[place]));
    told.append(piece, " ");
  });
  return told;
}

async function predict(by, name, record, out, signal, model) {
  const body = by === EXTRACT ? { model: name, input: record.text } : { model: name, records: [record] };
  const answer = await ask(PATHS[by], body, signal);
  const [found] = (await answer.json()).predictions;
  if (found.error) throw new Error(found.error);
  const told = found.prediction, words = found.words;
  if (Array.isArray(told) && Array.isArray(words)) out.append(tagged(words, told));
  else out.append(make("pre", typeof told === "string" ? told : JSON.stringify(told, null, 1)));
  const likely = found.scores;
  const isClass = likely && typeof likely === "object" && !Array.isArray(likely);
  if (isClass) out.append(scores(likely));
  let right = null;
  if (isClass && typeof told === "string") {
    right = make("select", "", { "aria-label": "what it should have been" });
    right.append(new Option("should be …", ""), ...Object.keys(likely).sort().map((label) => new Option(label, label)));
  }
  out.append(...judging(model, answer, right, "label"));
}

function record() {
  const read = (text) => {
    if (!/^\s*[[{]/.test(text)) return text;
    try { return JSON.parse(text); } catch { return text; }
  };
  return Object.fromEntries([...$("fields").querySelectorAll("textarea")].map(({ name, value }) => [name, read(value)]));
}

async function send(event) {
  event.preventDefault();
  if (asking) return;
  asking = new AbortController();
  busy(true);
  const given = record();
  const places = ["model", ...($("beside").value ? ["beside"] : [])];
  await Promise.all(places.map(async (place) => {
    const name = $(place).value, by = way(chosen(place));
    const out = panel(place, name);
    const speaks = by === CHAT || by === WRITE;
    if (!speaks) out.replaceChildren(out.firstChild);
    try {
      if (speaks) await write(place, name, $("fields").querySelector("textarea").value, out, asking.signal);
      else if (by) await predict(by, name, given, out, asking.signal, chosen(place));
      else throw new Error("this model has nothing to be tried here");
    } catch (error) {
      const text = error.name === "AbortError" ? "Stopped." : error.message;
      out.append(make("p", text, { class: "error", role: "alert" }));
      if (way(chosen(place)) === CHAT && talk[place].at(-1)?.role === "user") talk[place].pop();
    }
  }));
  asking = null;
  busy(false);
  if (way(chosen("model")) === CHAT) $("fields").querySelector("textarea").value = "";
  $("fields").querySelector("textarea").focus();
}

function panel(place, name) {
  const id = `answer-${place}`;
  const found = $(id);
  if (found && found.dataset.name === name) return found;
  const made = make("article", "", { id, "data-name": name, "aria-label": `answers of ${name}` });
  made.append(make("h3", name));
  if (found) { found.replaceWith(made); talk[place] = []; } else $("answers").append(made);
  return made;
}

function busy(isBusy) {
  $("send").disabled = isBusy;
  $("stop").disabled = !isBusy;
  $("answers").setAttribute("aria-busy", String(isBusy));
  $("told").textContent = isBusy ? "Waiting for an answer …" : "";
}

function forget() {
  talk = { model: [], beside: [] };
  $("answers").replaceChildren();
  $("fields").querySelectorAll("textarea").forEach((input) => { input.value = ""; });
  $("fields").querySelector("textarea")?.focus();
}

$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => { sessionStorage.setItem("key", $("key").value); look(); });
$("model").addEventListener("change", show);
$("beside").addEventListener("change", () => {
  $("answer-beside")?.remove();
  talk.beside = [];
});
$("ask").addEventListener("submit", send);
$("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") asking?.abort(); });
$("stop").addEventListener("click", () => asking?.abort());
$("clear").addEventListener("click", forget);
look();
