"use strict";

const at = (id) => document.getElementById(id);
const SIDE = 1536; // pixels; the model's input is not larger
let imageUri = null;
let running = null; // the AbortController of the answer in progress
let key = ""; // in memory only

function headers() {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// The error message of a response.
async function errorMessage(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `status ${response.status}`;
  }
}

async function findModel() {
  const response = await fetch("v1/models", { headers: headers() });
  at("key-form").hidden = response.status !== 401;
  if (response.ok) {
    at("model").textContent = (await response.json()).data[0].id;
  } else {
    at("model").textContent = "";
    if (response.status !== 401 || key) showError(await errorMessage(response));
  }
}

// Encode as PNG or JPEG of at most SIDE pixels; the server reads few other formats.
async function toUri(source, width, height) {
  const scale = Math.min(1, SIDE / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
  return scale < 1 || source instanceof HTMLVideoElement
    ? canvas.toDataURL("image/jpeg", 0.95)
    : canvas.toDataURL("image/png");
}

async function takeFile(file) {
  if (!file || !file.type.startsWith("image/")) return;
  try {
    const bitmap = await createImageBitmap(file);
    imageUri = await toUri(bitmap, bitmap.width, bitmap.height);
    stopCamera();
    showImage();
  } catch {
    showError("this file is not an image that the browser can read");
  }
}

function showImage() {
  at("image").src = imageUri || "";
  at("image").hidden = at("remove").hidden = !imageUri;
  at("hint").hidden = Boolean(imageUri) || !at("video").hidden;
}

function showError(message) {
  at("answer").classList.add("error");
  at("answer").textContent = message;
}

async function startCamera() {
  if (at("video").srcObject) return stopCamera();
  try {
    at("video").srcObject = await navigator.mediaDevices.getUserMedia({ video: true });
    await at("video").play();
    imageUri = null;
    at("video").hidden = at("ask-frame").hidden = false;
    at("camera").textContent = "Camera off";
    showImage();
  } catch (error) {
    stopCamera();
    showError(`the camera cannot be used: ${error.message}`);
  }
}

function stopCamera() {
  const stream = at("video").srcObject;
  if (stream) stream.getTracks().forEach((track) => track.stop());
  at("video").srcObject = null;
  at("video").hidden = at("ask-frame").hidden = true;
  at("camera").textContent = "Camera";
  showImage();
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
    }
  }
}

async function ask(uri) {
  if (running) running.abort();
  const own = (running = new AbortController());
  const content = [{ type: "text", text: at("question").value }];
  if (uri) content.unshift({ type: "image_url", image_url: { url: uri } });
  const started = performance.now();
  let first = 0;
  at("answer").classList.remove("error");
  at("answer").textContent = at("times").textContent = "";
  at("stop").hidden = false;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify({
        model: at("model").textContent,
        messages: [{ role: "user", content }],
        stream: true,
        stream_options: { include_usage: true },
      }),
      signal: own.signal,
    });
    if (!response.ok) throw new Error(await errorMessage(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const text = event.choices[0]?.delta.content;
      if (text) {
        first ||= performance.now() - started;
        at("answer").textContent += text;
      }
      if (event.usage) showTimes(first, performance.now() - started, event.usage);
    }
  } catch (error) {
    if (!own.signal.aborted) showError(error.message);
  } finally {
    if (running === own) {
      running = null;
      at("stop").hidden = true;
    }
  }
}

function showTimes(first, all, usage) {
  const count = usage.completion_tokens;
  const rate = count > 1 ? `, then ${((1000 * (count - 1)) / (all - first)).toFixed(1)} tokens/s` : "";
  at("times").textContent = `First token after ${Math.round(first)} ms${rate}`;
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value.trim();
  at("key").value = "";
  findModel();
});
at("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask(imageUri);
});
at("ask-frame").addEventListener("click", async () => {
  const video = at("video");
  ask(await toUri(video, video.videoWidth, video.videoHeight));
});
at("stop").addEventListener("click", () => running && running.abort());
at("camera").addEventListener("click", startCamera);
at("remove").addEventListener("click", () => {
  imageUri = null;
  showImage();
});
at("file").addEventListener("change", () => takeFile(at("file").files[0]));
document.addEventListener("paste", (event) => takeFile(event.clipboardData.files[0]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  at("picture").classList.add("over");
});
document.addEventListener("dragleave", () => at("picture").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  at("picture").classList.remove("over");
  takeFile(event.dataTransfer.files[0]);
});
findModel().catch((error) => showError(error.message));
