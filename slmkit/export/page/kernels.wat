;; Products of matrices with SIMD. All addresses are in bytes of the imported memory.
;; Columns are a multiple of 32. Quantized weights have one scale, a bfloat16, for each 32 neighbours of a row.

;; Σ w[i] x[i] of n floats; n is a multiple of 16.
(func $dot (param $w i32) (param $x i32) (param $n i32) (result f32)
  (local $a v128) (local $b v128) (local $c v128) (local $d v128) (local $end i32)
  (local.set $end (i32.add (local.get $w) (i32.shl (local.get $n) (i32.const 2))))
  (loop $next
    (local.set $a (f32x4.add (local.get $a) (f32x4.mul (v128.load offset=0 (local.get $w)) (v128.load offset=0 (local.get $x)))))
    (local.set $b (f32x4.add (local.get $b) (f32x4.mul (v128.load offset=16 (local.get $w)) (v128.load offset=16 (local.get $x)))))
    (local.set $c (f32x4.add (local.get $c) (f32x4.mul (v128.load offset=32 (local.get $w)) (v128.load offset=32 (local.get $x)))))
    (local.set $d (f32x4.add (local.get $d) (f32x4.mul (v128.load offset=48 (local.get $w)) (v128.load offset=48 (local.get $x)))))
    (local.set $w (i32.add (local.get $w) (i32.const 64)))
    (local.set $x (i32.add (local.get $x) (i32.const 64)))
    (br_if $next (i32.lt_u (local.get $w) (local.get $end))))
  (local.set $a (f32x4.add (f32x4.add (local.get $a) (local.get $b)) (f32x4.add (local.get $c) (local.get $d))))
  (f32.add
    (f32.add (f32x4.extract_lane 0 (local.get $a)) (f32x4.extract_lane 1 (local.get $a)))
    (f32.add (f32x4.extract_lane 2 (local.get $a)) (f32x4.extract_lane 3 (local.get $a)))))

;; y[i] = Σ_j p[j] v[j, i]: n rows of v [n, columns], weighted by p [n].
(func $mix (param $p i32) (param $v i32) (param $y i32) (param $n i32) (param $columns i32)
  (local $i i32) (local $j i32) (local $at i32) (local $a v128)
  (loop $column
    (local.set $a (f32x4.splat (f32.const 0)))
    (local.set $j (i32.const 0))
    (local.set $at (i32.add (local.get $v) (local.get $i)))
    (loop $row
      (local.set $a (f32x4.add (local.get $a) (f32x4.mul
        (v128.load32_splat offset=0 (i32.add (local.get $p) (i32.shl (local.get $j) (i32.const 2))))
        (v128.load offset=0 (local.get $at)))))
      (local.set $at (i32.add (local.get $at) (i32.shl (local.get $columns) (i32.const 2))))
      (local.set $j (i32.add (local.get $j) (i32.const 1)))
      (br_if $row (i32.lt_u (local.get $j) (local.get $n))))
    (v128.store offset=0 (i32.add (local.get $y) (local.get $i)) (local.get $a))
    (local.set $i (i32.add (local.get $i) (i32.const 16)))
    (br_if $column (i32.lt_u (local.get $i) (i32.shl (local.get $columns) (i32.const 2))))))

;; 16 signed bytes, times the scale, as 16 floats.
(func $spread (param $codes v128) (param $scale v128) (param $out i32)
  (local $half v128)
  (local.set $half (i16x8.extend_low_i8x16_s (local.get $codes)))
  (v128.store offset=0 (local.get $out) (f32x4.mul (local.get $scale) (f32x4.convert_i32x4_s (i32x4.extend_low_i16x8_s (local.get $half)))))
  (v128.store offset=16 (local.get $out) (f32x4.mul (local.get $scale) (f32x4.convert_i32x4_s (i32x4.extend_high_i16x8_s (local.get $half)))))
  (local.set $half (i16x8.extend_high_i8x16_s (local.get $codes)))
  (v128.store offset=32 (local.get $out) (f32x4.mul (local.get $scale) (f32x4.convert_i32x4_s (i32x4.extend_low_i16x8_s (local.get $half)))))
  (v128.store offset=48 (local.get $out) (f32x4.mul (local.get $scale) (f32x4.convert_i32x4_s (i32x4.extend_high_i16x8_s (local.get $half))))))

;; A row of weights as floats. kind: 1 float16, 2 int8, 3 int4 (two in a byte, plus 8: the first 16 of 32 in the low bits).
(func $unpack (param $kind i32) (param $codes i32) (param $scales i32) (param $out i32) (param $columns i32)
  (local $end i32) (local $halves v128) (local $scale v128)
  (local.set $end (i32.add (local.get $out) (i32.shl (local.get $columns) (i32.const 2))))
  (if (i32.eq (local.get $kind) (i32.const 1)) (then
    (loop $four
      (local.set $halves (v128.load16x4_u offset=0 (local.get $codes)))
      ;; Exponent and fraction moved to a float's place, times 2^112: this is exact for subnormal numbers too.
      (v128.store offset=0 (local.get $out) (v128.or
        (f32x4.mul (f32x4.splat (f32.const 5192296858534827628530496329220096))
          (i32x4.shl (v128.and (local.get $halves) (i32x4.splat (i32.const 0x7fff))) (i32.const 13)))
        (i32x4.shl (v128.and (local.get $halves) (i32x4.splat (i32.const 0x8000))) (i32.const 16))))
      (local.set $codes (i32.add (local.get $codes) (i32.const 8)))
      (local.set $out (i32.add (local.get $out) (i32.const 16)))
      (br_if $four (i32.lt_u (local.get $out) (local.get $end))))))
  (if (i32.lt_u (i32.const 1) (local.get $kind)) (then
    (loop $group
      (local.set $scale (f32x4.splat (f32.reinterpret_i32 (i32.shl (i32.load16_u offset=0 (local.get $scales)) (i32.const 16)))))
      (local.set $halves (v128.load offset=0 (local.get $codes)))
      (if (i32.eq (local.get $kind) (i32.const 2)) (then
        (call $spread (local.get $halves) (local.get $scale) (local.get $out))
        (call $spread (v128.load offset=16 (local.get $codes)) (local.get $scale) (i32.add (local.get $out) (i32.const 64)))
        (local.set $codes (i32.add (local.get $codes) (i32.const 16)))))
      (if (i32.eq (local.get $kind) (i32.const 3)) (then
        (call $spread
          (i8x16.sub (v128.and (local.get $halves) (i8x16.splat (i32.const 15))) (i8x16.splat (i32.const 8)))
          (local.get $scale) (local.get $out))
        (call $spread
          (i8x16.sub (i8x16.shr_u (local.get $halves) (i32.const 4)) (i8x16.splat (i32.const 8)))
          (local.get $scale) (i32.add (local.get $out) (i32.const 64)))))
      (local.set $codes (i32.add (local.get $codes) (i32.const 16)))
      (local.set $scales (i32.add (local.get $scales) (i32.const 2)))
      (local.set $out (i32.add (local.get $out) (i32.const 128)))
      (br_if $group (i32.lt_u (local.get $out) (local.get $end)))))))

;; y[t, row] = Σ w[row, i] x[t, i] for t below `positions`. Strides are in bytes; `scratch` has room for one row of floats.
(func $multiply
  (param $kind i32) (param $codes i32) (param $scales i32) (param $rows i32) (param $columns i32) (param $row_bytes i32)
  (param $x i32) (param $x_stride i32) (param $y i32) (param $y_stride i32) (param $positions i32) (param $scratch i32)
  (local $row i32) (local $t i32) (local $from i32) (local $to i32)
  (loop $next_row
    (local.set $row (local.get $codes))
    (if (local.get $kind) (then
      (call $unpack (local.get $kind) (local.get $codes) (local.get $scales) (local.get $scratch) (local.get $columns))
      (local.set $row (local.get $scratch))))
    (local.set $t (i32.const 0))
    (local.set $from (local.get $x))
    (local.set $to (local.get $y))
    (loop $next_position
      (f32.store offset=0 (local.get $to) (call $dot (local.get $row) (local.get $from) (local.get $columns)))
      (local.set $from (i32.add (local.get $from) (local.get $x_stride)))
      (local.set $to (i32.add (local.get $to) (local.get $y_stride)))
      (local.set $t (i32.add (local.get $t) (i32.const 1)))
      (br_if $next_position (i32.lt_u (local.get $t) (local.get $positions))))
    (local.set $codes (i32.add (local.get $codes) (local.get $row_bytes)))
    (local.set $scales (i32.add (local.get $scales) (i32.shr_u (local.get $columns) (i32.const 4))))
    (local.set $y (i32.add (local.get $y) (i32.const 4)))
    (local.set $rows (i32.sub (local.get $rows) (i32.const 1)))
    (br_if $next_row (local.get $rows))))
