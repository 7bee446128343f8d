/** The picture on the stage, and the heat map of its tokens' entropy over it. */

/** Colours of entropy from 0 to the most, as red, green, blue. */
const HEAT = [[40, 48, 140], [150, 40, 150], [240, 105, 65], [255, 236, 130]];
const MOST_OPAQUE = 0.8;

export class View {
  #canvas = document.getElementById("view");
  #heat = document.getElementById("heat-layer");
  #legend = document.getElementById("legend");
  #most_bits = 1;
  #arrived = 0;
  #drawn = 0;
  /** @type {Uint8Array | null} */ #entropy = null;
  #showsHeat = false;

  /** Make room for the pictures of a model. */
  begin({ model, most_bits }) {
    this.#most_bits = most_bits;
    // Setting a canvas's size clears it, even to the same size: keep the picture after a loss.
    if (this.#canvas.width !== model.width) this.#canvas.width = model.width;
    if (this.#canvas.height !== model.height) this.#canvas.height = model.height;
    this.#heat.width = model.cols;
    this.#heat.height = model.rows;
    const ratio = (model.width / model.height).toFixed(4);
    document.documentElement.style.setProperty("--ratio", ratio);
    document.getElementById("most-bits").textContent = most_bits.toFixed(1);
    drawScale(document.getElementById("heat-scale"));
  }

  /**
   * Decode and draw a frame. Returns false if a newer one was drawn in the meantime.
   * @param {{frame: number, start: string, parts: Uint8Array[]}} header
   */
  async show(header) {
    // Frame numbers go down after a rewind, so the order is that of arrival.
    const order = (this.#arrived += 1);
    const [entropy, picture] = header.parts;
    const bitmap = await decode(picture);
    const isNewest = order > this.#drawn;
    if (isNewest) draw(this.#canvas, bitmap);
    bitmap.close();
    if (!isNewest) return false;
    this.#drawn = order;
    this.#canvas.dataset.frame = String(header.frame);
    this.#canvas.dataset.start = header.start;
    this.#entropy = entropy;
    this.#drawHeat();
    return true;
  }

  /** Scale the picture smoothly, or show its pixels. */
  scaleSmoothly(smooth) {
    this.#canvas.dataset.scale = smooth ? "smooth" : "sharp";
  }

  showHeat(on) {
    this.#showsHeat = on;
    this.#heat.hidden = this.#legend.hidden = !on;
    this.#drawHeat();
  }

  #drawHeat() {
    if (!this.#showsHeat || !this.#entropy) return;
    const context = this.#heat.getContext("2d");
    const image = context.createImageData(this.#heat.width, this.#heat.height);
    let sum = 0;
    this.#entropy.forEach((level, token) => {
      sum += level;
      image.data.set(heatColour(level / 255), token * 4);
    });
    context.putImageData(image, 0, 0);
    // A frame that the model did not draw comes without entropy.
    const mean = (sum / this.#entropy.length / 255) * this.#most_bits;
    document.getElementById("mean-bits").textContent = mean >= 0 ? mean.toFixed(2) : "\u2013";
  }
}

/** @param {Uint8Array} png @returns {Promise<ImageBitmap>} */
export function decode(png) {
  return createImageBitmap(new Blob([png], { type: "image/png" }));
}

/** Draw a picture over a whole canvas. */
export function draw(canvas, bitmap) {
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
}

/** Colour of a share of the most entropy: red, green, blue, opacity, each from 0 to 255. */
function heatColour(share) {
  const place = share * (HEAT.length - 1);
  const low = Math.min(Math.floor(place), HEAT.length - 2);
  const mixed = HEAT[low].map((from, i) => from + (HEAT[low + 1][i] - from) * (place - low));
  // A sure token lets the picture through.
  return [...mixed, 255 * MOST_OPAQUE * Math.sqrt(share)];
}

/** Draw the legend's scale with the very colours of the map. */
function drawScale(canvas) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x += 1) {
    const [red, green, blue] = heatColour(x / (canvas.width - 1));
    context.fillStyle = `rgb(${red}, ${green}, ${blue})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}
