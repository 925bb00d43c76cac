// A picture to paint on: what is painted is a mask of the picture's own pixels, so that what shows is
// what will be made anew. `element`, `props` and `watch` are given by the page (Gradio's gr.HTML);
// props.value is {picture, mask} from the server, and {mask} from here.
const [picture, mask] = element.querySelectorAll("canvas");
const [size, erase, clear] = element.querySelectorAll("input, button");
const marks = mask.getContext("2d");
const COLOUR = "#d55e00";
let painted = new Uint8Array(0);
let last = null;

function show() {
  marks.clearRect(0, 0, mask.width, mask.height);
  marks.fillStyle = COLOUR;
  for (let i = 0; i < painted.length; i++) {
    if (painted[i]) marks.fillRect(i % mask.width, Math.floor(i / mask.width), 1, 1);
  }
}

// "8x8:" and the base64 of a bit per pixel, row by row; "" where nothing is painted.
function text() {
  if (!painted.includes(1)) return "";
  let bytes = "";
  for (let i = 0; i < painted.length; i += 8) {
    let byte = 0;
    for (let bit = 0; bit < 8; bit++) byte = 2 * byte + (painted[i + bit] ?? 0);
    bytes += String.fromCharCode(byte);
  }
  return `${mask.width}x${mask.height}:${btoa(bytes)}`;
}

function load() {
  const source = props.value?.picture;
  if (!source) return;
  const image = new Image();
  image.onload = () => {
    for (const canvas of [picture, mask]) {
      canvas.width = image.naturalWidth;
      canvas.height = image.naturalHeight;
    }
    const large = image.naturalWidth > 96;
    element.firstElementChild.classList.toggle("large", large);
    element.firstElementChild.classList.add("ready");
    size.max = Math.max(1, Math.round(image.naturalWidth / 4));
    size.value = Math.max(1, Math.round(image.naturalWidth / 10));
    picture.getContext("2d").drawImage(image, 0, 0);
    painted = new Uint8Array(mask.width * mask.height);
    show();
    props.value = { mask: "" };
  };
  image.src = source;
}

// The pixel under the pointer, in pixels and their fractions.
function place(event) {
  const box = mask.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * mask.width;
  const y = ((event.clientY - box.top) / box.height) * mask.height;
  return [x, y];
}

function dot(x, y) {
  const radius = size.value / 2;
  for (let row = Math.floor(y - radius); row <= y + radius; row++) {
    for (let column = Math.floor(x - radius); column <= x + radius; column++) {
      if (row < 0 || column < 0 || row >= mask.height || column >= mask.width) continue;
      const under = row === Math.floor(y) && column === Math.floor(x); // a thin brush paints this
      if (under || Math.hypot(column + 0.5 - x, row + 0.5 - y) < radius) {
        painted[row * mask.width + column] = erase.checked ? 0 : 1;
      }
    }
  }
}

function stroke(event) {
  const [x, y] = place(event);
  const [fromX, fromY] = last ?? [x, y];
  const steps = Math.ceil(2 * Math.max(Math.abs(x - fromX), Math.abs(y - fromY))) + 1;
  for (let i = 1; i <= steps; i++) {
    dot(fromX + ((x - fromX) * i) / steps, fromY + ((y - fromY) * i) / steps);
  }
  last = [x, y];
  show();
}

mask.addEventListener("pointerdown", (event) => {
  mask.setPointerCapture(event.pointerId);
  last = null;
  stroke(event);
});
mask.addEventListener("pointermove", (event) => {
  if (mask.hasPointerCapture(event.pointerId)) stroke(event);
});
mask.addEventListener("lostpointercapture", () => {
  props.value = { mask: text() };
});
clear.addEventListener("click", () => {
  painted.fill(0);
  show();
  props.value = { mask: "" };
});
watch("value", load);
load();
