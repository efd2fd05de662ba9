// Keeps the page for the next visit, without a network. VERSION changes with any file of the page.

const VERSION = "@VERSION@";
const FILES = ["@FILES@"];
const PREFIX = "ffl-web " + self.registration.scope + " ";

self.addEventListener("install", (event) => event.waitUntil(keep()));

async function keep() {
  const cache = await caches.open(PREFIX + VERSION);
  // At the first visit the page is about to ask for its large files, which are kept as they pass; they are loaded once.
  const first = !self.registration.active;
  for (const file of FILES) {
    if (!(first && /\.(wasm|mjs|onnx|npz)$/.test(file))) await cache.add(addressOf(file));
  }
}

function addressOf(file) {
  return new URL(file, self.registration.scope).href;
}

self.addEventListener("activate", (event) => {
  event.waitUntil(forget().then(() => self.clients.claim()));
});

async function forget() {
  for (const name of await caches.keys()) {
    if (name.startsWith(PREFIX) && name !== PREFIX + VERSION) await caches.delete(name);
  }
}

self.addEventListener("fetch", (event) => {
  if (event.request.method !== "GET") return;
  event.respondWith(answer(event));
});

async function answer(event) {
  const { request } = event;
  const cache = await caches.open(PREFIX + VERSION);
  const kept = await cache.match(request, { ignoreSearch: true });
  if (kept) return kept;
  const fresh = await fetch(request);
  if (fresh.ok && FILES.some((file) => addressOf(file) === request.url)) {
    event.waitUntil(cache.put(request, fresh.clone()));
  }
  return fresh;
}
