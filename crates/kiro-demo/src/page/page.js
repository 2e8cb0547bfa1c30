"use strict";
const jaeger = document.body.dataset.jaeger;

function part(tag, name, text) {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  return element;
}

// traceresponse: version-traceid-spanid-flags; the last bit of the flags says whether the trace is kept.
function trace(header) {
  const [, id, , flags] = (header || "").split("-");
  if (!/^[0-9a-f]{32}$/.test(id || "")) return part("span", "soft", "no trace");
  if (!(parseInt(flags, 16) & 1)) return part("span", "soft", "trace not recorded");
  const link = part("a", "", "trace " + id.slice(0, 8) + "…");
  link.href = jaeger + "/trace/" + id;
  link.target = "_blank";
  link.rel = "noopener";
  return link;
}

function said(body, response) {
  if (body && body.said_by) return body.reject ? "mesh: " + body.reject : body.said_by;
  const reject = response.headers.get("x-kiro-reject");
  return reject ? "mesh: " + reject : "dashboard";
}

function show(output, response, text, took) {
  let body = null;
  try { body = JSON.parse(text); } catch { /* not JSON: shown as it is */ }
  const who = said(body, response);
  const verdict = part("div", "verdict", "");
  const kind = response.ok ? "" : who.startsWith("mesh") ? " mesh" : " bad";
  verdict.append(
    part("span", "status" + kind, response.status + (response.statusText ? " " + response.statusText : "")),
    part("span", "", "said by " + who),
    part("span", "soft", took.toFixed(0) + " ms"),
    trace(response.headers.get("traceresponse")),
  );
  output.replaceChildren(verdict, part("pre", "", body ? JSON.stringify(body, null, 2) : text));
  for (const hop of document.querySelectorAll(".hops li")) {
    hop.classList.toggle("said", hop.dataset.who === who);
  }
}

async function run(row, path) {
  const output = row.querySelector("output");
  const button = row.querySelector("button");
  if (button) button.disabled = true;
  const begin = performance.now();
  try {
    const response = await fetch(path, { cache: "no-store" });
    const text = await response.text();
    show(output, response, text, performance.now() - begin);
  } catch (error) {
    output.replaceChildren(part("pre", "", "no answer: " + error.message));
  } finally {
    if (button) button.disabled = false;
  }
}

const rows = [...document.querySelectorAll("article.try")];
for (const row of rows) {
  row.querySelector("button").addEventListener("click", () => run(row, row.dataset.path));
}
document.getElementById("own").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = document.getElementById("name");
  run(document.getElementById("own-try"), "/dashboard/" + encodeURIComponent(name.value || name.placeholder));
});
document.getElementById("all").addEventListener("click", async () => {
  for (const row of rows) await run(row, row.dataset.path);
});
