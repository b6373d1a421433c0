// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>
#include <vector>

#include "common/carver.h"
#include "dense_crf/mean_field_launch.cuh"

namespace pydense {
namespace {

constexpr int64_t kFilterChannels = 64;  // at a time

template <class T>
struct FieldSpace {
  int64_t width;
  T* logits;   // [batch, points, width]
  T* q;        // as many
  T* message;  // as many, or null
  T* z;        // as many, or null
  T* other;
  T* parts;
  std::vector<T*> rows;  // of each term
  size_t bytes;

  FieldSpace(const DeviceMeanFieldArgs<T>& args, void* memory) {
    width = args.kept.data == nullptr ? device_row_width(args.labels, sizeof(T))
                                      : training_row_width<T>(args.labels);
    const int64_t points = args.batch * args.points * width;
    bool matrix = false;
    int64_t vertices = 0;
    int64_t chunks = 0;
    Carver carver(memory);
    logits = carver.take<T>(points);
    q = carver.take<T>(points);
    for (int k = 0; args.iterations > 0 && k < args.num_terms; ++k) {
      const DeviceLattice<T>& lattice = args.terms[k].lattice;
      const int64_t copies = copies_of(lattice, args.batch);
      matrix = matrix || args.terms[k].kind == Compatibility::kMatrix;
      vertices = std::max(vertices, copies * lattice.capacity);
      chunks = std::max(chunks, copies * lattice.chunk_capacity);
      rows.push_back(carver.take<T>(copies * lattice.capacity * width));
    }
    other = carver.take<T>(vertices * width);
    parts = carver.take<T>(chunks * width);
    message = matrix ? carver.take<T>(points) : nullptr;
    const bool long_rows = width / kRowVector<T> > 32;
    z = long_rows || matrix || args.num_terms > kFieldTerms ? carver.take<T>(points) : nullptr;
    bytes = carver.used();
  }
};

}  // namespace

template <class T>
size_t mean_field_workspace(const DeviceMeanFieldArgs<T>& args) {
  return FieldSpace<T>(args, nullptr).bytes;
}

namespace {

template <class T>
class Field {
 public:
  Field(const DeviceMeanFieldArgs<T>& args, void* workspace, int device, void* stream)
      : args_(args), space_(args, workspace), device_(device), stream_(stream) {}

  void run() {
    const int least = args_.q.data == nullptr ? 0 : 1;
    PYDENSE_CHECK(args_.iterations >= least || args_.kept.steps > 0,
                  "mean_field: iterations must be at least ", least, ", got ", args_.iterations);
    load_rows(args_.unary, args_.batch, args_.labels, args_.points, args_.energies ? T{-1} : T{1},
              -std::numeric_limits<T>::infinity(), space_.logits, space_.width, device_, stream_);
    T* q = target(0);
    if (args_.q.data != nullptr) {
      load_rows(args_.q, args_.batch, args_.labels, args_.points, T{1}, T{0}, q, space_.width,
                device_, stream_);
      keep(0, q);
    }
    for (int i = least; i <= args_.iterations; ++i) {
      T* const to = target(i);
      iterate(i, q, to);
      keep(i, to);
      q = to;
    }
    if (args_.kind != MeanFieldOutput::kLabels && args_.out.data != nullptr) {
      store_rows(args_.out, args_.batch, args_.labels, args_.points, T{1}, q, space_.width, device_,
                 stream_);
    }
  }

 private:
  StepRows<T> kept() const { return {args_.kept, args_.batch, args_.points, space_.width}; }
  // Where Q_i goes.
  T* target(int i) const {
    T* const rows = i < args_.kept.steps ? kept().in_place(i) : nullptr;
    return rows == nullptr ? space_.q : rows;
  }
  void keep(int i, T* q) const {
    if (i < args_.kept.steps && q == space_.q) {
      kept().store(i, q, device_, stream_);
    }
  }

  FieldTerm<T> term_at(int k) const {
    const DeviceLattice<T>& lattice = args_.terms[k].lattice;
    return term_of(lattice, space_.rows[static_cast<size_t>(k)], lattice.slice_norm);
  }

  // `to` may be q.
  void iterate(int i, const T* q, T* to) {
    const int terms = i > 0 ? args_.num_terms : 0;
    const T* base = space_.logits;
    std::vector<FieldTerm<T>> simple;
    for (int k = 0; k < terms; ++k) {
      const DeviceTerm<T>& from = args_.terms[k];
      const DeviceLattice<T>& lattice = from.lattice;
      splat_and_blur<T>(
          {lattice, q, lattice.splat_norm, copies_of(lattice, args_.batch), space_.width, false},
          {space_.rows[static_cast<size_t>(k)], space_.other, space_.parts}, device_, stream_);
      FieldTerm<T> term = term_at(k);
      if (from.kind != Compatibility::kMatrix) {
        term.kind = from.kind;
        term.compat = from.compat;
        simple.push_back(term);
        continue;
      }
      const int64_t points = args_.batch * args_.points;
      slice_rows(term, q, points, args_.labels, space_.width, space_.message, device_, stream_);
      launch_product<T>({space_.message, from.compat, false, base, space_.z, points, args_.labels,
                         static_cast<int>(space_.width / kRowVector<T>)},
                        device_, stream_);
      base = space_.z;
    }
    const auto count = static_cast<int>(simple.size());
    FieldParams<T> update{};
    update.vectors = static_cast<int>(space_.width / kRowVector<T>);
    update.labels = args_.labels;
    update.points = args_.batch * args_.points;
    update.q = q;
    update.z = space_.z;
    update.labels_out = args_.out_labels;
    update.base = base;
    for (int first = 0; first == 0 || first < count; first += kFieldTerms) {
      update.num_terms = std::min(count - first, kFieldTerms);
      std::copy_n(simple.begin() + first, update.num_terms, update.terms);
      const bool through = first + kFieldTerms >= count;
      update.kind = !through               ? MeanFieldOutput::kLogits
                    : i < args_.iterations ? MeanFieldOutput::kProbabilities
                                           : args_.kind;
      update.out = through ? to : space_.z;
      launch_update(update, device_, stream_);
      update.base = space_.z;
    }
  }

  const DeviceMeanFieldArgs<T>& args_;
  const FieldSpace<T> space_;
  const int device_;
  void* const stream_;
};

}  // namespace

template <class T>
void mean_field_cuda(const DeviceMeanFieldArgs<T>& args, void* workspace, int device,
                     void* stream) {
  Field<T>(args, workspace, device, stream).run();
}

namespace {

template <class T>
struct ChannelSpace {
  int64_t width;
  T* values;
  T* filtered;
  FilterSpace<T> vertices;
  size_t bytes;

  ChannelSpace(const DeviceFilterArgs<T>& args, void* memory) {
    width = device_row_width(std::min(args.channels, kFilterChannels), sizeof(T));
    const int64_t copies = copies_of(args.lattice, args.batch);
    const int64_t points = args.batch * args.lattice.shape.points * width;
    Carver carver(memory);
    values = carver.take<T>(points);
    filtered = carver.take<T>(points);
    vertices.rows = carver.take<T>(copies * args.lattice.capacity * width);
    vertices.other = carver.take<T>(copies * args.lattice.capacity * width);
    vertices.parts = carver.take<T>(copies * args.lattice.chunk_capacity * width);
    bytes = carver.used();
  }
};

}  // namespace

template <class T>
size_t filter_workspace(const DeviceFilterArgs<T>& args) {
  return ChannelSpace<T>(args, nullptr).bytes;
}

template <class T>
void filter_lattice_cuda(const DeviceFilterArgs<T>& args, void* workspace, int device,
                         void* stream) {
  const ChannelSpace<T> space(args, workspace);
  const DeviceLattice<T>& lattice = args.lattice;
  // The transposed filter has the factors of the other side.
  const T* before = args.reverse ? lattice.slice_norm : lattice.splat_norm;
  const T* after = args.reverse ? lattice.splat_norm : lattice.slice_norm;
  const int64_t points = lattice.shape.points;
  for (int64_t first = 0; first < args.channels; first += kFilterChannels) {
    const int64_t channels = std::min(kFilterChannels, args.channels - first);
    const int64_t width = device_row_width(channels, sizeof(T));
    DeviceArray<const T> values = args.values;
    values.data += first * values.strides[1];
    DeviceArray<T> out = args.out;
    out.data += first * out.strides[1];
    load_rows(values, args.batch, channels, points, T{1}, T{0}, space.values, width, device,
              stream);
    splat_and_blur<T>(
        {lattice, space.values, before, copies_of(lattice, args.batch), width, args.reverse},
        space.vertices, device, stream);
    slice_rows(term_of(lattice, space.vertices.rows, after), static_cast<const T*>(space.values),
               args.batch * points, channels, width, space.filtered, device, stream);
    store_rows(out, args.batch, channels, points, T{1}, space.filtered, width, device, stream);
  }
}

#define PYDENSE_INSTANTIATE(T)                                                     \
  template size_t mean_field_workspace(const DeviceMeanFieldArgs<T>&);             \
  template void mean_field_cuda(const DeviceMeanFieldArgs<T>&, void*, int, void*); \
  template size_t filter_workspace(const DeviceFilterArgs<T>&);                    \
  template void filter_lattice_cuda(const DeviceFilterArgs<T>&, void*, int, void*);
PYDENSE_INSTANTIATE(float)
PYDENSE_INSTANTIATE(double)
#undef PYDENSE_INSTANTIATE

}  // namespace pydense
