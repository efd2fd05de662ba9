// The drawing pad: pointer, touch and keyboard; sends its picture after every stroke.
// Gradio gives `element` and `trigger`. The keyboard: arrows move the pen, Space lowers and lifts it, Delete clears.
const canvas = element.querySelector("canvas");
const pen = element.querySelector(".pen");
const hint = element.querySelector(".hint"); // until something is drawn
const context = canvas.getContext("2d");
const STEP = 1 / 20; // of the canvas, for one press of an arrow
let position = [0.5, 0.5];
let down = false; // the pointer or the pen of the keyboard touches the paper
let timer = null;

function clear() {
    hint.classList.remove("gone");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.lineWidth = canvas.width / 11;
    context.lineCap = context.lineJoin = "round";
    context.strokeStyle = "#000";
}

function lineTo(next) {
    hint.classList.add("gone");
    context.beginPath();
    context.moveTo(position[0] * canvas.width, position[1] * canvas.height);
    context.lineTo(next[0] * canvas.width, next[1] * canvas.height);
    context.stroke();
}

function move(next) {
    if (down) lineTo(next);
    position = next;
    pen.style.left = `${100 * position[0]}%`;
    pen.style.top = `${100 * position[1]}%`;
    pen.classList.toggle("down", down);
}

function send() {
    clearTimeout(timer); // strokes that follow each other at once are one drawing
    timer = setTimeout(() => trigger("submit", {drawing: canvas.toDataURL("image/png")}), 300);
}

function at(event) {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    position = at(event);
    down = true;
    move(position);
});
canvas.addEventListener("pointermove", (event) => {
    if (down && canvas.hasPointerCapture(event.pointerId)) move(at(event));
});
for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, () => {
        down = false;
        move(position);
        send();
    });
}
canvas.addEventListener("keydown", (event) => {
    const direction = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (direction) {
        move(position.map((value, axis) => Math.min(1, Math.max(0, value + STEP * direction[axis]))));
        if (down) send();
    } else if (event.key === " ") {
        down = !down;
        move(position);
        if (!down) send();
    } else if (event.key === "Delete") {
        clear();
        send();
    } else {
        return;
    }
    event.preventDefault();
});
element.querySelector("button").addEventListener("click", () => {
    clear();
    send();
});
clear();
