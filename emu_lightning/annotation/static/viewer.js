// The pictures on the stage, and looking closely: the same region of both, in step.

const CLICK = 5; // pixels a pointer may stray in a click
const GAP = 12; // pixels between two pictures, as in app.css

export class Viewer {
  #pictures = []; // {pane, frame, width, height, fit}
  #zoom = 1; // 1 shows the whole picture
  #centre = [0.5, 0.5]; // the point of the pictures in the middle of the panes, as shares of width and height
  #pointers = new Map();
  #strayed = 0;

  /** @param stage the element the pictures fill; @param layout told whether two pictures lie one above the other */
  constructor(stage, layout) {
    this.stage = stage;
    this.layout = layout;
    new ResizeObserver(() => this.#fit()).observe(stage);
    stage.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    stage.addEventListener("pointerdown", (event) => this.#down(event));
    stage.addEventListener("pointermove", (event) => this.#move(event));
    for (const kind of ["pointerup", "pointercancel"]) {
      stage.addEventListener(kind, (event) => this.#up(event, kind === "pointerup"));
    }
  }

  /** Reserves the boxes of these pictures ({side, width, height}) before any of them is loaded. */
  reserve(pictures) {
    this.#pictures = pictures.map(({ side, width, height }) => {
      const pane = document.createElement("div");
      pane.className = "pane";
      pane.dataset.side = side;
      const frame = document.createElement("div");
      frame.className = "frame";
      pane.append(frame);
      return { pane, frame, width, height, fit: 1 };
    });
    this.stage.replaceChildren(...this.#pictures.map(({ pane }) => pane));
    this.#zoom = 1;
    this.#centre = [0.5, 0.5];
    this.#fit();
  }

  /** Puts loaded pictures ({image}, in the order of `reserve`) into their boxes. */
  fill(loaded, labels) {
    loaded.forEach(({ image }, i) => {
      const { frame, fit } = this.#pictures[i];
      image.alt = labels[i];
      image.classList.toggle("small", fit > 2);
      frame.replaceChildren(image);
    });
  }

  get isZoomed() {
    return this.#zoom > 1;
  }

  /** Between the whole picture and its full size: one pixel of the picture on one of the screen. */
  toggle([picture, point] = this.#middle()) {
    if (!picture) return;
    if (this.isZoomed) this.#to(1, [0.5, 0.5], true);
    else this.#about(picture, point, Math.max(2, 1 / picture.fit), true);
  }

  /** Moves the region by shares of the pane. */
  pan(x, y) {
    if (!this.isZoomed) return;
    const { pane, frame } = this.#pictures[0];
    const dx = (x * pane.clientWidth) / (frame.offsetWidth * this.#zoom);
    const dy = (y * pane.clientHeight) / (frame.offsetHeight * this.#zoom);
    this.#to(this.#zoom, [this.#centre[0] + dx, this.#centre[1] + dy], true);
  }

  zoomBy(factor) {
    if (this.#pictures.length) this.#to(this.#zoom * factor, this.#centre, true);
  }

  #middle() {
    const [picture] = this.#pictures;
    return [picture, picture && [picture.pane.clientWidth / 2, picture.pane.clientHeight / 2]];
  }

  #fit() {
    if (!this.#pictures.length) return;
    const style = getComputedStyle(this.stage);
    const width = this.stage.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    const height = this.stage.clientHeight;
    const scale = (w, h) => Math.min(...this.#pictures.map((p) => Math.min(w / p.width, h / p.height)));
    const isStacked =
      this.#pictures.length === 2 &&
      width < height &&
      scale(width, (height - GAP) / 2) > scale((width - GAP) / 2, height);
    this.stage.classList.toggle("stacked", isStacked);
    this.layout(isStacked);
    for (const picture of this.#pictures) {
      const { pane, frame } = picture;
      picture.fit = Math.min(pane.clientWidth / picture.width, pane.clientHeight / picture.height);
      frame.style.width = `${picture.width * picture.fit}px`;
      frame.style.height = `${picture.height * picture.fit}px`;
    }
    this.#draw();
  }

  #to(zoom, centre, isSmooth = false) {
    const most = Math.max(8, ...this.#pictures.map(({ fit }) => 4 / fit));
    this.#zoom = Math.min(most, Math.max(1, zoom));
    this.#centre = centre;
    this.stage.classList.toggle("zooming", isSmooth);
    this.stage.classList.toggle("zoomed", this.isZoomed);
    this.#draw();
  }

  /** Zooms so that what lies under `point` of this picture's pane stays there. */
  #about({ pane, frame }, [x, y], zoom, isSmooth = false) {
    const from = [x - pane.clientWidth / 2, y - pane.clientHeight / 2];
    const sizes = [frame.offsetWidth, frame.offsetHeight];
    const point = sizes.map((size, i) => this.#centre[i] + from[i] / (size * this.#zoom));
    this.#to(zoom, sizes.map((size, i) => point[i] - from[i] / (size * zoom)), isSmooth);
  }

  #draw() {
    // A pane never shows beyond the edge of its picture, so the first picture bounds the common centre.
    const { pane, frame } = this.#pictures[0];
    const bound = (centre, size, room) => {
      const half = Math.min(0.5, room / 2 / (size * this.#zoom));
      return Math.min(1 - half, Math.max(half, centre));
    };
    this.#centre = [
      bound(this.#centre[0], frame.offsetWidth, pane.clientWidth),
      bound(this.#centre[1], frame.offsetHeight, pane.clientHeight),
    ];
    for (const { pane, frame } of this.#pictures) {
      const x = pane.clientWidth / 2 - this.#centre[0] * frame.offsetWidth * this.#zoom;
      const y = pane.clientHeight / 2 - this.#centre[1] * frame.offsetHeight * this.#zoom;
      frame.style.transform = `translate(${x}px, ${y}px) scale(${this.#zoom})`;
    }
  }

  #at(event) {
    const picture = this.#pictures.find(({ pane }) => pane.contains(event.target)) ?? this.#pictures[0];
    const box = picture.pane.getBoundingClientRect();
    return [picture, [event.clientX - box.left, event.clientY - box.top]];
  }

  #wheel(event) {
    event.preventDefault();
    if (!this.#pictures.length) return;
    const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 30 : 1;
    const factor = Math.exp(-Math.max(-120, Math.min(120, event.deltaY * lines)) / 400);
    const [picture, point] = this.#at(event);
    this.#about(picture, point, Math.max(1, this.#zoom * factor));
  }

  #down(event) {
    if (event.button || !event.target.closest(".pane")) return;
    if (!this.#pointers.size) this.#strayed = 0;
    this.#pointers.set(event.pointerId, event);
    event.target.closest(".pane").setPointerCapture(event.pointerId);
  }

  #move(event) {
    const before = this.#pointers.get(event.pointerId);
    if (!before) return;
    const dx = event.clientX - before.clientX;
    const dy = event.clientY - before.clientY;
    const other = [...this.#pointers.values()].find((pointer) => pointer.pointerId !== event.pointerId);
    this.#pointers.set(event.pointerId, event);
    this.#strayed += Math.hypot(dx, dy);
    const [picture, point] = this.#at(event);
    if (other) {
      const spread = (pointer) => Math.hypot(pointer.clientX - other.clientX, pointer.clientY - other.clientY);
      this.#about(picture, point, this.#zoom * (spread(event) / Math.max(1, spread(before))));
    } else if (this.isZoomed && this.#strayed > CLICK) {
      const { frame } = picture;
      const [x, y] = this.#centre;
      const [width, height] = [frame.offsetWidth * this.#zoom, frame.offsetHeight * this.#zoom];
      this.#to(this.#zoom, [x - dx / width, y - dy / height]);
    }
  }

  #up(event, isWhole) {
    if (!this.#pointers.delete(event.pointerId)) return;
    if (isWhole && !this.#pointers.size && this.#strayed <= CLICK) this.toggle(this.#at(event));
  }
}
