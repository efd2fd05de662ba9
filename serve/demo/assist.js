// What Gradio leaves out: names for pictures and example buttons, an answer that is in view, no broken pictures.
// Gradio gives `element`; the names of the examples, in their order, are in its data-names.
const names = JSON.parse(element.querySelector("[data-names]").dataset.names);
const root = element.closest(".gradio-container") ?? document.body;
const shown = {};

function assist() {
    root.querySelectorAll("button.gallery-item").forEach((button, number) => {
        const name = names[number % Math.max(1, names.length)] ?? `Example ${number + 1}`;
        if (button.getAttribute("aria-label") !== name) button.setAttribute("aria-label", name);
    });
    root.querySelectorAll("div.empty[aria-label]:not([role])").forEach((empty) => empty.setAttribute("role", "img"));
    root.querySelectorAll(".prose table:not([tabindex])").forEach((table) => {
        if (table.scrollWidth > table.clientWidth) table.setAttribute("tabindex", "0"); // the keyboard scrolls it too
    });
    // the words on it are its name
    root.querySelectorAll("button.thumbnail-item[aria-label]").forEach((picture) => {
        if (picture.innerText.trim()) picture.removeAttribute("aria-label");
    });
    root.querySelectorAll("button.upload-container").forEach((place) => {
        if (place.innerText.trim()) place.removeAttribute("aria-label");
        else if (!place.getAttribute("aria-label")) place.setAttribute("aria-label", "Choose files");
    });
    const files = root.querySelector("#files [data-testid='upload-text']:not([data-said])");
    if (files) {
        files.dataset.said = "yes"; // Gradio's nodes stay, emptied: it takes them away itself
        files.childNodes.forEach((node) => {
            if (node.nodeType === Node.TEXT_NODE || node.classList?.contains("or")) node.textContent = "";
        });
        files.append("Drop images or zip files here, or choose some.");
    }
    root.querySelectorAll("#files [style*='height']:not([tabindex])").forEach((list) => list.setAttribute("tabindex", "0"));
    root.querySelectorAll("img").forEach((image) => {
        if (!image.getAttribute("alt")) {
            const label = image.closest(".block")?.querySelector("[data-testid='block-label']")?.innerText?.trim();
            image.setAttribute("alt", label || "Picture");
        }
        if (!image.dataset.watched) {
            image.dataset.watched = "yes";
            image.addEventListener("error", () => (image.style.visibility = "hidden"));
            image.addEventListener("load", () => (image.style.visibility = ""));
        }
    });
    // On a phone what was asked fills the screen: the answer comes into view by itself.
    for (const [id, words] of [["status", " say"], ["batch-status", " classified"]]) {
        const status = root.querySelector(`#${id}`);
        const text = status?.innerText ?? "";
        if (text === shown[id]) continue;
        shown[id] = text;
        if (text.includes(words) && matchMedia("(max-width: 640px)").matches) {
            status.scrollIntoView({block: "center", behavior: "smooth"});
        }
    }
}

new MutationObserver(assist).observe(root, {subtree: true, childList: true, characterData: true});
assist();
