// Keeps the page for the next visit, without a network. VERSION changes with any file of the page.

const VERSION = "@VERSION@";
const FILES = ["@FILES@"];
const PREFIX = `ffl-web ${self.registration.scope} `; // page.js uses the same name

self.addEventListener("install", (event) => event.waitUntil(keep()));

async function keep() {
  const cache = await caches.open(PREFIX + VERSION);
  for (const file of FILES) {
    const address = new URL(file, self.registration.scope).href;
    // The page has put its large files here already: nothing is loaded twice.
    // The browser's own cache may still hold an earlier build's file: the server is asked whether it has changed.
    if (!(await cache.match(address))) await cache.add(new Request(address, { cache: "no-cache" }));
  }
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
  if (event.request.method === "GET") event.respondWith(answer(event.request));
});

async function answer(request) {
  const cache = await caches.open(PREFIX + VERSION);
  return (await cache.match(request, { ignoreSearch: true })) ?? fetch(request);
}
